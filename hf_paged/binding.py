"""Which model is running on this thread, and which pool is whose.

A cache learns its model when the first states arrive: from the call under way, never from the config,
which two models may share. Forward hooks on the "paged" models keep the stack of calls.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedModel

from .config import PagedConfig
from .kv_pool import KVPool
from .sequences import Sequences

_HOOKS = "_hf_paged_hooks"
_pools: "weakref.WeakKeyDictionary[PreTrainedModel, KVPool]" = weakref.WeakKeyDictionary()
_configs: "weakref.WeakKeyDictionary[PreTrainedModel, PagedConfig]" = weakref.WeakKeyDictionary()
# What runs packed steps on the pool of a model, or why it has none. An engine holds its pool, not the reverse.
_engines: "weakref.WeakKeyDictionary[PreTrainedModel, Any]" = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()
_engine_lock = threading.RLock()  # Held while one is tried out: calls that begin together wait for it.


class Inputs(Mapping):
    """What a forward was called with, by keyword or by position. Keeps nothing alive.

    An object that lives no longer, or that cannot be referenced weakly, counts as None.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self._values = {name: _weakly(value) for name, value in (*enumerate(args), *kwargs.items())}

    def __getitem__(self, name: str | int) -> Any:
        return self._values[name]()

    def __iter__(self) -> Iterator:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _weakly(value: Any) -> Callable[[], Any]:
    if isinstance(value, bool | int | float | str):
        return lambda: value
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: None


class Call:
    """One forward of a paged model, while it runs.

    An interrupt ends a forward without the hook that would take it off the stack. So a call knows its forward by the
    frame that runs it, and keeps neither the model nor its inputs alive.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs, frame: FrameType):
        self._model, self.inputs = weakref.ref(model), inputs
        self._frame = id(frame), frame.f_code

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def is_run_by(self, frame: FrameType) -> bool:
        return self._frame == (id(frame), frame.f_code)


@dataclass
class MaskRequest:
    """A paged layer was asked for its mask sizes: the mask function that comes next belongs to it."""

    sequences: "weakref.ref[Sequences]"
    layer: int
    sizes: tuple[int, int, int]  # query length, kv length, kv offset


class _ThreadState(threading.local):
    def __init__(self):
        self.calls: list[Call] = []
        self.mask_request: MaskRequest | None = None


_thread = _ThreadState()


def current_call() -> Call | None:
    """The innermost forward of a paged model that runs on this thread. For code that a forward calls.

    Outside a forward it may be one that an interrupt has ended: `running_call` looks.
    """
    return _thread.calls[-1] if _thread.calls else None


def running_call() -> Call | None:
    """The innermost forward of a paged model that runs on this thread. For code that may run outside a forward."""
    calls = _thread.calls
    if calls and not torch.compiler.is_compiling():  # Nothing is traced outside a forward.
        _drop_interrupted(sys._getframe(1))
    return current_call()


def argument(name: str) -> Any:
    """What the models that run on this thread were called with as `name`; None if none of them was."""
    return next((call.inputs[name] for call in reversed(_thread.calls) if call.inputs.get(name) is not None), None)


def request_mask(sequences: Sequences, layer: int, sizes: tuple[int, int, int]) -> None:
    """Announce to the mask function, on this thread, which cache its next mask is for."""
    _thread.mask_request = MaskRequest(weakref.ref(sequences), layer, sizes)


def take_mask_request(sizes: tuple[int, int, int]) -> tuple[Sequences, int] | None:
    """The cache and layer a mask of these sizes is for, if a paged layer was just asked for them."""
    request, _thread.mask_request = _thread.mask_request, None
    if request is None or request.sizes != sizes:
        return None
    sequences = request.sequences()
    return None if sequences is None else (sequences, request.layer)


def track(model: PreTrainedModel) -> None:
    """Keep `model`'s forwards on the stack of calls. Idempotent."""
    if _HOOKS not in model.__dict__:
        hooks = (
            model.register_forward_pre_hook(_enter, with_kwargs=True),
            model.register_forward_hook(_leave, always_call=True),
        )
        model.__dict__[_HOOKS] = hooks


def untrack(model: PreTrainedModel) -> None:
    """Undo `track`. Idempotent."""
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()


def _enter(model, args, kwargs):
    if not torch.compiler.is_compiling():
        _thread.mask_request = None
        frame = sys._getframe(1)
        if _thread.calls:
            _drop_interrupted(frame.f_back)
        _thread.calls.append(Call(model, Inputs(args, kwargs), frame))


def _drop_interrupted(frame: FrameType | None) -> None:
    """Keep the calls that `frame` and its callers run."""
    running = []
    while frame is not None and len(running) < len(_thread.calls):
        running += [call for call in _thread.calls if call.is_run_by(frame)]
        frame = frame.f_back
    _thread.calls = [call for call in _thread.calls if call in running]


def _leave(model, args, output):
    if torch.compiler.is_compiling():
        return
    _thread.mask_request = None
    # A call that raised before its own hook ran must not stay on the stack.
    while _thread.calls and _thread.calls.pop().model is not model:
        pass


def pool_of(model: PreTrainedModel) -> KVPool:
    """The pool of a model that runs, made at first use."""
    with _registry_lock:
        if model not in _pools:
            _pools[model] = KVPool(_configs.get(model, PagedConfig()))
        return _pools[model]


def _submodules(model: torch.nn.Module):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}: pass the model itself, such as pipe.model")
    return model.modules()


def pools_under(model: torch.nn.Module) -> list[KVPool]:
    """Every pool of `model` and of the models inside it (the decoder owns the pool)."""
    with _registry_lock:
        return [_pools[module] for module in _submodules(model) if module in _pools]


def engine_of(model: PreTrainedModel, make) -> Any:
    """What `make` returned for this model since its pools were last let go of."""
    with _engine_lock:
        with _registry_lock:
            if model in _engines:
                return _engines[model]
        made = make(model)
        with _registry_lock:
            return _engines.setdefault(model, made)


def implementation_of(model: torch.nn.Module) -> str:
    """The attention implementation of the decoder in `model`, as its config names it now."""
    models = (module for module in _submodules(model) if isinstance(module, PreTrainedModel))
    return next((module.config.get_text_config(decoder=True)._attn_implementation for module in models), "none")


def forget_pools(model: torch.nn.Module) -> None:
    """Let go of the pools under `model`; caches that are alive keep theirs until they die."""
    with _registry_lock:
        for module in _submodules(model):
            _pools.pop(module, None)
            _engines.pop(module, None)


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
