"""The registry of models: the pool of each, its configuration, its engine, and the counts of its calls."""

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel

from hf_paged.atomic import after_fork_in_child
from hf_paged.compat.transformers import attention_implementation
from hf_paged.config import PagedConfig
from hf_paged.memory.kv_pool import KVPool
from hf_paged.models.refusal import Refusal
from hf_paged.models.structure import structure

_pools: "weakref.WeakKeyDictionary[torch.nn.Module, KVPool]" = weakref.WeakKeyDictionary()
# The dtype and device that a model had when its pool was made.
_made_for: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.dtype, torch.device]]" = weakref.WeakKeyDictionary()
_configs: "weakref.WeakKeyDictionary[torch.nn.Module, PagedConfig]" = weakref.WeakKeyDictionary()
_counts: "weakref.WeakKeyDictionary[torch.nn.Module, CallCounts]" = weakref.WeakKeyDictionary()
# An engine holds its pool, not the reverse.
_engines: "weakref.WeakKeyDictionary[torch.nn.Module, _KeptEngine]" = weakref.WeakKeyDictionary()
# Refusals in training mode, by the state of the model that was tried.
_refused_in_training: "weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, _KeptEngine]]" = (
    weakref.WeakKeyDictionary()
)
_CALLS_UNTIL_DOUBT = 8
_MAX_STATES = 8  # Of a model that are kept.
_registry_lock = threading.Lock()
_trial_lock = threading.RLock()


@dataclass
class CallCounts:
    """How the calls of `generate` and of pipelines on one model ran, whether it has a pool or not."""

    packed: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    pipelines_together: int = 0
    pipelines_in_turn: Counter[str] = field(default_factory=Counter)


class EngineOfPool(Protocol):
    """An engine, as far as the registry knows it."""

    pool: KVPool


class _KeptEngine:
    """An engine, or the refusal of one, and the structure of the model that it was made for.

    A refusal is doubted when the model's structure has changed. Not every cause can be seen, so it is doubted without
    that, too: after 8 calls, after 16 more, after 32 more.

    Attributes
    ----------
    states : dict of (tuple or None) to None
        What `training_state` said of the model when the engine was tried, in the order of the trials.
    """

    def __init__(self, made: EngineOfPool | Refusal, model: PreTrainedModel, calls_until_doubt: int):
        self.made, self.structure = made, structure(model)
        self.calls_until_doubt = self._calls_left = calls_until_doubt
        self.states: dict[tuple | None, None] = {}

    def count_call(self, model: PreTrainedModel) -> bool:
        """Count a call; tell whether the refusal that it meets is in doubt."""
        if not isinstance(self.made, Refusal):
            return False
        self._calls_left -= 1
        return self._calls_left < 0 or self.structure != structure(model)


def pool_of(model: PreTrainedModel) -> KVPool:
    """The pool of a model that runs, made at first use, and anew after ``model.to(...)``."""
    with _registry_lock:
        if model not in _pools or _made_for[model] != (model.dtype, model.device):
            _make_pool(model)
        return _pools[model]


def _make_pool(model: PreTrainedModel) -> None:
    """Make a new, empty pool. Caches and calls that are alive keep the old one; its memory goes with the last."""
    new, old = KVPool(_configs.get(model) or PagedConfig.from_environment()), _pools.get(model)
    if old is not None:
        new.page_reads, new.gathers, new.prefix_counts = old.page_reads, old.gathers, old.prefix_counts
        new.capture_counts, new.swap_counts = old.capture_counts, old.swap_counts
        for owner in [owner for owner, kept in _engines.items() if getattr(kept.made, "pool", None) is old]:
            del _engines[owner]
    _pools[model], _made_for[model] = new, (model.dtype, model.device)


def renew_pools(model: torch.nn.Module, even_good: bool = False) -> None:
    """Make the pools under `model` anew that were made for another dtype or device; the statistics go on.

    Parameters
    ----------
    even_good : bool
        All pools.
    """
    with _registry_lock:
        for module in _submodules(model):
            if not isinstance(module, PreTrainedModel) or module not in _pools:
                continue
            if even_good or _made_for[module] != (module.dtype, module.device):
                _make_pool(module)


def _submodules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}: pass the model itself, such as pipe.model")
    return model.modules()


def pools_under(model: torch.nn.Module) -> list[KVPool]:
    """Every pool of `model` and of the models inside it (the decoder owns the pool)."""
    with _registry_lock:
        return [_pools[module] for module in _submodules(model) if module in _pools]


def trial_lock() -> threading.RLock:
    """The lock to hold while an engine is looked up and, where there is none, a model is tried.

    Calls that begin together wait for one trial. It is the process's, as is what a trial changes in `torch.compiler`.
    """
    return _trial_lock


def engine_of(model: PreTrainedModel, training: tuple | None = None) -> EngineOfPool | Refusal | None:
    """The engine of this model, or the `Refusal` of one. None if the model is to be tried. Called once per call.

    An engine is forgotten when the model's pools are let go of or made anew. A refusal is in doubt now and then.

    Parameters
    ----------
    training : tuple or None
        The model's `training_state`. An engine serves it in the states in which it was tried.
    """
    with _registry_lock:
        kept = _engines.get(model)
        if training is not None:
            kept = _refused_in_training.get(model, {}).get(training, kept)
        if kept is not None and not isinstance(kept.made, Refusal) and training not in kept.states:
            return None
    return None if kept is None or kept.count_call(model) else kept.made


def keep_engine(model: PreTrainedModel, made: EngineOfPool | Refusal, training: tuple | None) -> EngineOfPool | Refusal:
    """Keep the outcome of a trial for the calls to come: an engine, or a lasting refusal.

    An engine whose pool another thread has let go of meanwhile, by `release` or `configure`, is not kept.

    Parameters
    ----------
    training : tuple or None
        The model's `training_state`. A refusal holds in that state alone.

    Returns
    -------
    EngineOfPool or Refusal
        What serves the model: the engine that it had already, where only its state was tried.
    """
    with _registry_lock:
        if isinstance(made, Refusal):
            _keep_refusal(model, made, training)
            return made
        if training is not None:
            _refused_in_training.get(model, {}).pop(training, None)
        kept = _engines.get(model)
        if kept is None or getattr(kept.made, "pool", None) is not made.pool:
            if not any(_pools.get(module) is made.pool for module in _submodules(model)):
                return made
            kept = _engines[model] = _KeptEngine(made, model, _CALLS_UNTIL_DOUBT)
        _keep_latest(kept.states, training, None)
        return kept.made


def _keep_refusal(model: PreTrainedModel, refusal: Refusal, training: tuple | None) -> None:
    if not refusal.is_lasting:
        return
    kept = _engines.get(model) if training is None else _refused_in_training.get(model, {}).get(training)
    calls_until_doubt = _CALLS_UNTIL_DOUBT if kept is None else 2 * kept.calls_until_doubt
    kept = _KeptEngine(refusal, model, calls_until_doubt)
    if training is None:
        _engines[model] = kept
    else:
        _keep_latest(_refused_in_training.setdefault(model, {}), training, kept)


def _keep_latest(states: dict, training: tuple | None, value) -> None:
    """Enter a state as the newest; the oldest make room."""
    states.pop(training, None)
    states[training] = value
    while len(states) > _MAX_STATES:
        del states[next(iter(states))]


def is_outdated(model: PreTrainedModel, engine: EngineOfPool) -> bool:
    """Tell whether the model is not what it was when the engine was made for it."""
    with _registry_lock:
        kept = _engines.get(model)
    return kept is None or kept.made is not engine or kept.structure != structure(model)


def forget_engine(model: PreTrainedModel, engine: EngineOfPool) -> None:
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


def models() -> list[torch.nn.Module]:
    """The models that have a pool, or counts."""
    with _registry_lock:
        return [*_pools, *_counts]


def implementation_of(model: torch.nn.Module) -> str:
    """The attention implementation of the decoder in `model`, as its config names it now."""
    models = (module for module in _submodules(model) if isinstance(module, PreTrainedModel))
    configs = (module.config.get_text_config(decoder=True) for module in models)
    return next(map(attention_implementation, configs), None) or "none"


def forget_pools(model: torch.nn.Module) -> None:
    """Let go of the pools and counts under `model`; caches that are alive keep their pool until they die."""
    with _registry_lock:
        for module in _submodules(model):
            _pools.pop(module, None)
            _made_for.pop(module, None)
            _engines.pop(module, None)
            _refused_in_training.pop(module, None)
            _counts.pop(module, None)


def set_config(model: torch.nn.Module, config: PagedConfig) -> None:
    """Use `config` for the pools made from now on under `model`."""
    with _registry_lock:
        for module in _submodules(model):
            if isinstance(module, PreTrainedModel):
                _configs[module] = config


def config_of(model: torch.nn.Module) -> PagedConfig:
    """The config that a pool made now under `model` would get.

    Raises
    ------
    PagedError
        If it comes from the environment, and a variable has a wrong value.
    """
    with _registry_lock:
        stated = next((_configs[module] for module in _submodules(model) if module in _configs), None)
    return stated or PagedConfig.from_environment()


def _reset_in_child() -> None:
    """In a forked child no thread is left that could let go of these."""
    global _registry_lock, _trial_lock
    _registry_lock, _trial_lock = threading.Lock(), threading.RLock()


after_fork_in_child(_reset_in_child)
