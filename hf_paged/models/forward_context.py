"""The forwards of "paged" models that run on this thread, and the mask that the next layer of one wants.

Forward hooks on "paged" models keep the stack. A cache learns its model from it when the first states arrive, never
from the config, which two models may share.
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

from hf_paged.compat.transformers import supports_flash_attention, supports_sdpa
from hf_paged.models import registration

_HOOKS = "_hf_paged_hooks"


class Inputs(Mapping):
    """The arguments of a forward, by keyword or by position. Keeps nothing alive.

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


class Forward:
    """One forward of a paged model, while it runs.

    An interrupt ends a forward without the hook that would take it off the stack. So a call knows its forward by the
    frame that runs it, and keeps neither the model nor its inputs alive.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs, frame: FrameType):
        self._model, self.inputs = weakref.ref(model), inputs
        self._frame = id(frame), frame.f_code
        self.times_off = registration.times_off()  # When it began.
        # Asked by every layer.
        self.supports_sdpa = supports_sdpa(model)
        self.supports_fused = self.supports_sdpa or supports_flash_attention(model)

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def is_run_by(self, frame: FrameType) -> bool:
        return self._frame == (id(frame), frame.f_code)


@dataclass
class MaskRequest:
    """A paged layer was asked for its mask sizes: the mask function that comes next belongs to it."""

    batch: weakref.ref  # Of the `BatchState` that the layer belongs to.
    layer: int
    sizes: tuple[int, int, int]  # query length, kv length, kv offset


class _ThreadState(threading.local):
    def __init__(self):
        self.calls: list[Forward] = []
        self.mask_request: MaskRequest | None = None


_thread = _ThreadState()


def current_forward() -> Forward | None:
    """The innermost forward of a paged model that runs on this thread. For code that a forward calls.

    Outside a forward it may be one that an interrupt has ended: `running_forward` looks.
    """
    return _thread.calls[-1] if _thread.calls else None


def running_forward() -> Forward | None:
    """The innermost forward of a paged model that runs on this thread. For code that may run outside a forward."""
    calls = _thread.calls
    if calls and not torch.compiler.is_compiling():  # Nothing is traced outside a forward.
        _drop_interrupted(sys._getframe(1))
    return current_forward()


def argument(name: str) -> Any:
    """What the models that run on this thread were called with as `name`; None if none of them was."""
    return next((call.inputs[name] for call in reversed(_thread.calls) if call.inputs.get(name) is not None), None)


def request_mask(batch: Any, layer: int, sizes: tuple[int, int, int]) -> None:
    """Announce to the mask function, on this thread, which cache its next mask is for."""
    _thread.mask_request = MaskRequest(weakref.ref(batch), layer, sizes)


def take_mask_request(sizes: tuple[int, int, int]) -> tuple[Any, int] | None:
    """The cache and layer a mask of these sizes is for, if a paged layer was just asked for them."""
    request, _thread.mask_request = _thread.mask_request, None
    if request is None or request.sizes != sizes:
        return None
    batch = request.batch()
    return None if batch is None else (batch, request.layer)


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
        _thread.calls.append(Forward(model, Inputs(args, kwargs), frame))


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
