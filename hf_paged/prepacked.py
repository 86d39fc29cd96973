"""Prepacked weights: a second copy of the linear layers' weights, in the layout of oneDNN's matrix kernels.

torch keeps weights as they were loaded, and for every product of a few rows oneDNN lays them out anew. A step of few
tokens spends up to half of its products on that.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .config import PagedConfig

# Kernels for other numbers of rows read this layout as well: a step's number is not known before.
_ROWS = 32


@dataclass(frozen=True)
class _Copy:
    weight: torch.Tensor  # Opaque to all but oneDNN.
    origin: tuple[int, int]  # Address and version of the weight that was copied.


class PrepackedLinears(TorchFunctionMode):
    """While entered, products with the weights of linear layers on the CPU use copies of them, made at first use.

    A weight that was written to or replaced is copied again; an edit through ``.data`` leaves no trace and is not
    seen. ``torch.compile`` can trace through it, several times slower than without.
    """

    def __init__(self):
        super().__init__()
        self._copies = WeakIdKeyDictionary()  # torch.nn.Parameter -> _Copy

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not functional.linear or len(args) + len(kwargs) < 2:
            return function(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input, weight, bias=None):
        if not _can_prepack(input, weight):
            return functional.linear(input, weight, bias)
        copy, origin = self._copies.get(weight), (weight.data_ptr(), weight._version)
        if copy is None or copy.origin != origin:
            copy = _Copy(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS), origin)
            self._copies[weight] = copy
        return torch.ops.mkldnn._linear_pointwise(input, copy.weight, bias, "none", [], "")


def linears_of(config: PagedConfig) -> contextlib.AbstractContextManager:
    """What packed steps enter to run their linear layers as `config` says."""
    return PrepackedLinears() if config.prepack_weights else contextlib.nullcontext()


@functools.cache
def _dtypes() -> set[torch.dtype]:
    """What oneDNN multiplies on this processor."""
    if not torch.backends.mkldnn.is_available():
        return set()
    mkldnn = torch.ops.mkldnn
    halves = {torch.bfloat16: mkldnn._is_mkldnn_bf16_supported, torch.float16: mkldnn._is_mkldnn_fp16_supported}
    return {torch.float32, *(dtype for dtype, is_supported in halves.items() if is_supported())}


def _can_prepack(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        type(weight) is torch.nn.Parameter  # Not a quantised one, which is a subclass.
        and weight.device.type == "cpu"
        and weight.dtype in _dtypes()
        and weight.dtype == input.dtype
        and weight.is_contiguous()
        and not weight.is_inference()
        and not torch.is_grad_enabled()
        and input.numel() > 0
    )
