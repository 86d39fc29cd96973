"""The pool, the configuration, the engine and the counts of each model."""

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged.atomic import after_fork_in_child
from hf_paged.compat.transformers import attention_implementation
from hf_paged.config import PagedConfig
from hf_paged.memory.kv_pool import KVPool
from hf_paged.models.structure import structure
from hf_paged.reasons import Why

_pools: "weakref.WeakKeyDictionary[PreTrainedModel, KVPool]" = weakref.WeakKeyDictionary()
# The dtype and device that a model had when its pool was made.
_places: "weakref.WeakKeyDictionary[PreTrainedModel, tuple]" = weakref.WeakKeyDictionary()
_configs: "weakref.WeakKeyDictionary[PreTrainedModel, PagedConfig]" = weakref.WeakKeyDictionary()
_counts: "weakref.WeakKeyDictionary[PreTrainedModel, CallCounts]" = weakref.WeakKeyDictionary()
# An engine holds its pool, not the reverse.
_engines: "weakref.WeakKeyDictionary[PreTrainedModel, _KeptEngine]" = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()
_engine_lock = threading.RLock()  # Held while one is tried out: calls that begin together wait for it.


@dataclass
class CallCounts:
    """How the calls of `generate` on one model ran, whether it has a pool or not."""

    packed: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Refusal:
    """Why a model has no engine.

    Attributes
    ----------
    why : Reason
    is_lasting : bool
        Whether the model itself is the cause. If not, the next call asks again.
    """

    why: Why
    is_lasting: bool = True


class _KeptEngine:
    """An engine, or the refusal of one, and the structure of the model that it was made for.

    A refusal is doubted when the model's structure has changed. Not every cause can be seen, so it is doubted without
    that, too: after 8 calls, after 16 more, after 32 more.
    """

    def __init__(self, made: Any, model: PreTrainedModel, patience: int = 8):
        self.made, self.structure = made, structure(model)
        self.patience = self._left = patience

    def is_doubtful(self, model: PreTrainedModel) -> bool:
        """Tell whether another engine must be asked for. Called once a call."""
        if not isinstance(self.made, Refusal):
            return False
        self._left -= 1
        return self._left < 0 or self.structure != structure(model)


def pool_of(model: PreTrainedModel) -> KVPool:
    """The pool of a model that runs, made at first use, and anew after ``model.to(...)``."""
    with _registry_lock:
        if model not in _pools or _places[model] != (model.dtype, model.device):
            _make_pool(model)
        return _pools[model]


def _make_pool(model: PreTrainedModel) -> None:
    """Make a new, empty pool. Caches and calls that are alive keep the old one; its memory goes with the last."""
    new, old = KVPool(_configs.get(model, PagedConfig())), _pools.get(model)
    if old is not None:
        new.page_reads, new.gathers, new.prefix_counts = old.page_reads, old.gathers, old.prefix_counts
        for owner in [owner for owner, kept in _engines.items() if getattr(kept.made, "pool", None) is old]:
            del _engines[owner]
    _pools[model], _places[model] = new, (model.dtype, model.device)


def renew_pools(model: torch.nn.Module, even_good: bool = False) -> None:
    """Make the pools under `model` anew that were made for another dtype or device; the statistics go on.

    Parameters
    ----------
    even_good : bool
        All pools.
    """
    with _registry_lock:
        for module in _submodules(model):
            if module in _pools and (even_good or _places[module] != (module.dtype, module.device)):
                _make_pool(module)


def _submodules(model: torch.nn.Module):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}: pass the model itself, such as pipe.model")
    return model.modules()


def pools_under(model: torch.nn.Module) -> list[KVPool]:
    """Every pool of `model` and of the models inside it (the decoder owns the pool)."""
    with _registry_lock:
        return [_pools[module] for module in _submodules(model) if module in _pools]


def engine_of(model: PreTrainedModel, make) -> Any:
    """The engine of this model, or the `Refusal` of one, made by `make` at first use.

    Made again after the model's pools were let go of or renewed, and where a refusal is doubtful.
    """
    with _engine_lock:
        with _registry_lock:
            kept = _engines.get(model)
        if kept is not None and not kept.is_doubtful(model):
            return kept.made
        made = make(model)
        is_refusal = isinstance(made, Refusal)
        # Another thread may have called `release` or `configure` meanwhile.
        if made.is_lasting if is_refusal else any(pool is made.pool for pool in pools_under(model)):
            patience = 2 * kept.patience if kept is not None and is_refusal else 8
            with _registry_lock:
                _engines[model] = _KeptEngine(made, model, patience)
        return made


def is_outdated(model: PreTrainedModel, engine: Any) -> bool:
    """Tell whether the model is not what it was when the engine was made for it."""
    with _registry_lock:
        kept = _engines.get(model)
    return kept is None or kept.made is not engine or kept.structure != structure(model)


def forget_engine(model: PreTrainedModel, engine: Any) -> None:
    """Let go of an engine; calls that are under way on it go on."""
    with _registry_lock:
        kept = _engines.get(model)
        if kept is not None and kept.made is engine:
            del _engines[model]


def counts_of(model: PreTrainedModel) -> CallCounts:
    """How the calls of `generate` on this model ran since its pools were last let go of."""
    with _registry_lock:
        return _counts.setdefault(model, CallCounts())


def counts_under(model: torch.nn.Module) -> list[CallCounts]:
    """The counts of `model` and of the models inside it."""
    with _registry_lock:
        return [_counts[module] for module in _submodules(model) if module in _counts]


def implementation_of(model: torch.nn.Module) -> str:
    """The attention implementation of the decoder in `model`, as its config names it now."""
    models = (module for module in _submodules(model) if isinstance(module, PreTrainedModel))
    configs = (module.config.get_text_config(decoder=True) for module in models)
    return next(map(attention_implementation, configs), None) or "none"


def forget_pools(model: torch.nn.Module) -> None:
    """Let go of the pools and counts under `model`; caches that are alive keep their pool until they die."""
    with _registry_lock:
        for module in _submodules(model):
            for registry in (_pools, _places, _engines, _counts):
                registry.pop(module, None)


def set_config(model: torch.nn.Module, config: PagedConfig) -> None:
    """Use `config` for the pools made from now on under `model`."""
    with _registry_lock:
        for module in _submodules(model):
            if isinstance(module, PreTrainedModel):
                _configs[module] = config


def config_of(model: torch.nn.Module) -> PagedConfig:
    """The config that a pool made now under `model` would get."""
    with _registry_lock:
        return next((_configs[module] for module in _submodules(model) if module in _configs), PagedConfig())


def _reset_in_child() -> None:
    """In a forked child no thread is left that could let go of these."""
    global _registry_lock, _engine_lock
    _registry_lock, _engine_lock = threading.Lock(), threading.RLock()


after_fork_in_child(_reset_in_child)
