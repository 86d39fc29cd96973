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


class Inputs(Mapping[str | int, Any]):
    """The arguments of a forward, by keyword or by position. Keeps nothing alive.

    An object that lives no longer, or that cannot be referenced weakly, counts as None.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self._values = {name: _weakly(value) for name, value in (*enumerate(args), *kwargs.items())}

    def __getitem__(self, name: str | int) -> Any:
        return self._values[name]()

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _weakly(value: Any) -> Callable[[], Any]:
    """A function that returns `value` as long as something else keeps it alive, and then None."""
    if isinstance(value, bool | int | float | str):
        return lambda: value
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: None


class Forward:
    """One forward of a paged model, while it runs.

    An interrupt ends a forward without the hook that would take it off the stack. So this knows the frame that runs
    the forward, and keeps neither the model nor its inputs alive.

    Attributes
    ----------
    inputs : Inputs
    times_off : int
        How often "paged" had been taken out of transformers when the forward began.
    supports_sdpa, supports_fused : bool
        Whether the model may attend with sdpa, and with that or flash attention. Every layer asks.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs, frame: FrameType):
        self._model, self.inputs = weakref.ref(model), inputs
        self._frame = id(frame), frame.f_code
        self.times_off = registration.times_off()
        self.supports_sdpa = supports_sdpa(model)
        self.supports_fused = self.supports_sdpa or supports_flash_attention(model)

    @property
    def model(self) -> PreTrainedModel:
        """The model. For code that its forward calls: it lives so long."""
        model = self._model()
        assert model is not None, "a model lives while its forward runs"
        return model

    def is_of(self, model: PreTrainedModel) -> bool:
        """Tell whether this is a forward of `model`, ended by an interrupt or not."""
        return self._model() is model

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
        self.forwards: list[Forward] = []  # The innermost is the last.
        self.mask_request: MaskRequest | None = None


_thread = _ThreadState()


def current_forward() -> Forward | None:
    """The innermost forward of a paged model that runs on this thread; None if there is none. For code inside forwards.

    Outside a forward it may be one that an interrupt has ended: `running_forward` looks.
    """
    return _thread.forwards[-1] if _thread.forwards else None


def running_forward() -> Forward | None:
    """The innermost forward of a paged model that runs on this thread. For code that may run outside a forward."""
    if _thread.forwards and not torch.compiler.is_compiling():  # Nothing is traced outside a forward.
        _drop_interrupted(sys._getframe(1))
    return current_forward()


def argument(name: str) -> Any:
    """The argument `name` of the innermost forward on this thread that was called with one; None if none was."""
    forwards = reversed(_thread.forwards)
    return next((forward.inputs[name] for forward in forwards if forward.inputs.get(name) is not None), None)


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
    """Keep `model`'s forwards on the stack. Idempotent."""
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
        if _thread.forwards:
            _drop_interrupted(frame.f_back)
        _thread.forwards.append(Forward(model, Inputs(args, kwargs), frame))


def _drop_interrupted(frame: FrameType | None) -> None:
    """Keep the forwards that `frame` and its callers run."""
    running: list[Forward] = []
    while frame is not None and len(running) < len(_thread.forwards):
        running += [forward for forward in _thread.forwards if forward.is_run_by(frame)]
        frame = frame.f_back
    _thread.forwards = [forward for forward in _thread.forwards if forward in running]


def _leave(model, args, output):
    if torch.compiler.is_compiling():
        return
    _thread.mask_request = None
    # A forward that raised before its own hook ran must not stay on the stack.
    while _thread.forwards and not _thread.forwards.pop().is_of(model):
        pass
