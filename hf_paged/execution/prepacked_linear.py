"""Prepacked weights: a second copy of the linear layers' weights, in the layout of oneDNN's matrix kernels.

torch keeps weights as they were loaded, and for every product of a few rows oneDNN lays them out anew. A step of few
tokens spends up to half of its products on that.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from hf_paged.compat.torch import (
    children_of,
    prepack_linear_weight,
    prepackable_dtypes,
    prepacked_linear,
    version_of,
)
from hf_paged.execution.content_sample import sample

# Kernels for other numbers of rows read this layout as well: a step's number is not known before.
_ROWS = 32
# What a multiplication with a copy stands for. A class that is patched later has another.
_FORWARD = torch.nn.Linear.forward


@dataclass(frozen=True)
class _Copy:
    weight: torch.Tensor  # Opaque to all but oneDNN.
    origin: tuple[int, int]  # Address and version of the weight that was copied.
    sample: torch.Tensor  # Of its content.


class PrepackedLinears:
    """Copies of the weights of linear layers on the CPU, made at first use.

    A weight that was written to or replaced is copied again; one whose version did not tell, when `forget_changed` is
    called. Steps that ``torch.compile`` traces multiply with the weights themselves.
    """

    def __init__(self):
        self._copies = WeakIdKeyDictionary()  # torch.nn.Parameter -> _Copy
        # They stay the same for torch.compile's sake.
        self._forwards: weakref.WeakKeyDictionary[torch.nn.Linear, PrepackedForward] = weakref.WeakKeyDictionary()
        self.thread: int | None = None  # The one that `used_by` serves now.

    @contextlib.contextmanager
    def used_by(self, model: torch.nn.Module) -> Iterator[None]:
        """Let the linear layers of `model` multiply with the copies while this is entered, in this thread alone.

        For that time they have a ``forward`` of their own: a function mode, which sees every call of torch, would cost
        a decode step a tenth of its time. A layer whose ``forward`` was replaced before keeps that one.
        """
        forwards = {
            module: self._forwards.setdefault(module, PrepackedForward(self, module))
            for module in _plain_linears(model)
        }
        self.thread = threading.get_ident()
        try:
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            self.thread = None
            for module, forward in forwards.items():
                if module.__dict__.get("forward") is forward:
                    del module.__dict__["forward"]

    def forget_changed(self) -> None:
        """Drop the copies of weights that were written to without a trace, by ``.data`` or a fused optimizer."""
        for weight, copy in list(self._copies.items()):
            if not torch.equal(copy.sample, sample(weight.detach())):
                self._copies.pop(weight, None)

    def copy_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The prepacked copy of `weight`; None if oneDNN cannot multiply with one."""
        copy = self._copies.get(weight)
        if copy is not None and copy.origin == (weight.data_ptr(), version_of(weight)):
            return copy.weight
        if not _can_prepack(weight):
            return None
        packed = prepack_linear_weight(weight.detach(), _ROWS)
        origin = (weight.data_ptr(), version_of(weight))
        self._copies[weight] = _Copy(packed, origin, sample(weight.detach()))
        return packed


class PrepackedForward:
    """``torch.nn.Linear.forward`` of one module. In the thread that `used_by` serves it multiplies with a copy.

    Parameters
    ----------
    linears : PrepackedLinears
        Whose copies.
    module : torch.nn.Linear
        Not kept alive.
    """

    __slots__ = ("_linears", "_module")

    def __init__(self, linears: PrepackedLinears, module: torch.nn.Linear):
        self._linears, self._module = linears, weakref.ref(module)

    def __reduce__(self):
        # A copy of the module, made by another thread meanwhile, multiplies in torch's own way.
        return getattr, (self._module(), "forward")

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        module = self._module()
        assert module is not None, "a module's forward is called while the module lives"
        if torch.compiler.is_compiling() or threading.get_ident() != self._linears.thread:
            return functional.linear(input, module.weight, module.bias)
        weight, bias, copy = module.weight, module.bias, None
        if input.dtype == weight.dtype and input.numel() > 0:
            copy = self._linears.copy_of(weight)
        if copy is None:
            return functional.linear(input, weight, bias)
        return prepacked_linear(input, copy, bias)


def _plain_linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Linear layers of `model` that multiply in torch's own way."""
    found: list[torch.nn.Linear] = []
    left = [model]
    while left:
        module = left.pop()
        left.extend(child for child in children_of(module).values() if child is not None)
        if isinstance(module, torch.nn.Linear) and type(module).forward is _FORWARD:
            # An interrupt may have left a forward of ours behind.
            if isinstance(vars(module).get("forward"), PrepackedForward | None):
                found.append(module)
    return found


def _can_prepack(weight: torch.Tensor) -> bool:
    """Tell whether oneDNN has a layout of its own for this weight."""
    return (
        type(weight) is torch.nn.Parameter  # Not a quantised one, which is a subclass.
        and weight.device.type == "cpu"
        and weight.dtype in prepackable_dtypes()
        and weight.is_contiguous()
        and not weight.is_inference()
    )
