"""The one table of bounds that compiled kernels must keep to, with the figures of others beside.

The anchors were measured in the same way on kernels of vLLM 0.33 and SGLang 0.5.23: head 128, block 16, 8 KV heads,
GQA 4, bf16, 4 warps, none of them spills, each holds one tile of keys and values in flight.
"""

from dataclasses import dataclass

from hf_paged_evals.triton.cases import Case
from hf_paged_evals.triton.targets import Target

PREFILL_ROWS = 64
_ATTENTION = ("decode", "rows", "prefill")
_NVIDIA = ("sm80", "sm90", "sm100")


@dataclass(frozen=True)
class Threshold:
    """A bound on one figure of some kernels.

    Attributes
    ----------
    figure : str
        ``spilled`` (bytes), ``shared`` (share of what a program may have), ``programs`` (a processor holds),
        ``instructions`` (of a warp, a KV token and KV head in the hot loop; of prefill, for `PREFILL_ROWS` rows of
        the product), ``wide`` (share of 128-bit loads),
        ``buffers`` (tiles of keys and values in flight), ``waits`` (copies under way while the loop computes).
    at_least, at_most : float or None
    kernels, archs, dtypes : tuple of str
        Of which it holds.
    dims : tuple of int
        Head sizes of which it holds; empty: all.
    is_full : bool or None
        Only with, or only without, window, softcap and sinks.
    max_group : int
        Largest group of heads of which it holds.
    is_quantized : bool or None
        Only of quantised pages, or only of others; None: of both.
    anchor : str
        The figures of others.
    """

    figure: str
    kernels: tuple[str, ...]
    archs: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    dims: tuple[int, ...] = ()
    is_full: bool | None = None
    max_group: int = 64
    is_quantized: bool | None = False
    anchor: str = ""

    def applies(self, case: Case, target: Target) -> bool:
        return (
            case.kernel in self.kernels
            and target.arch in self.archs
            and case.dtype in self.dtypes
            and (not self.dims or max(case.dims) in self.dims)
            and self.is_full in (None, case.is_full)
            and case.group <= self.max_group
            and self.is_quantized in (None, case.codes is not None)
        )

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


_LATENT = ("latent", "latent_tiles")
_ALL = (*_ATTENTION, *_LATENT, "reduce", "write", "copy")
_EVERYWHERE = (*_NVIDIA, "gfx942")
_HALF = ("bf16", "fp16")
_VLLM_DECODE = "vLLM split decode: 66.8 (sm90), 67.5 (sm80); SGLang grouped decode: 33.1 at page 1, 50.5 at page 16"
_VLLM_FULL = "vLLM split decode with window, softcap and sinks: 68.8 (sm90)"
_VLLM_PREFILL = "vLLM prefill: 38.6 (sm90) for 16 rows of a product; these are for 64"
_ONE_BUFFER = "vLLM and SGLang: 1"
_VLLM_INT8 = "vLLM split decode, int8 per token and head: 119.3 (sm90)"
_CODES_FULL = "at 73 instructions, not memory, are what an H100 waits for, at 79 an A100"

THRESHOLDS = (
    Threshold("spilled", _ALL, _EVERYWHERE, at_most=0, anchor="all anchors: 0"),
    Threshold("shared", _ALL, _EVERYWHERE, at_most=1, is_quantized=None),
    Threshold("wide", _ALL, _EVERYWHERE, at_least=1, dtypes=_HALF),
    Threshold("wide", ("reduce", "write", "copy"), _EVERYWHERE, at_least=1, dtypes=("fp32",)),
    # In float32 the few queries are loaded again in the loop, 32 or 64 bits a thread.
    Threshold("wide", (*_ATTENTION, *_LATENT), _EVERYWHERE, at_least=0.8, dtypes=("fp32",)),
    Threshold("programs", _ALL, _EVERYWHERE, at_least=1, anchor="vLLM and SGLang: 5 to 7, of smaller tiles"),
    Threshold("programs", ("decode",), _NVIDIA, at_least=2, dtypes=_HALF, dims=(64, 80, 96, 128)),
    Threshold("buffers", (*_ATTENTION, *_LATENT), _NVIDIA, at_least=2, anchor=_ONE_BUFFER),
    Threshold("waits", (*_ATTENTION, *_LATENT), _NVIDIA, at_least=1, anchor="vLLM: 0"),
    Threshold("instructions", ("decode", "rows"), _NVIDIA, at_most=33, dtypes=_HALF, dims=(64, 80, 96, 128),
              is_full=False, max_group=16, anchor=_VLLM_DECODE),
    Threshold("instructions", ("decode", "rows"), _NVIDIA, at_most=33, is_full=True, anchor=_VLLM_FULL),
    Threshold("instructions", ("prefill",), ("sm90", "sm100"), at_most=38.6, dtypes=_HALF, dims=(64, 80, 96, 128),
              is_full=False, anchor=_VLLM_PREFILL),
    Threshold("instructions", ("prefill",), ("sm80",), at_most=51.5, dtypes=_HALF, dims=(64, 80, 96, 128),
              is_full=False, anchor="a third of vLLM's a row: its 38.6 for 16 rows are 154 for 64"),
    # Of quantised pages. A few registers wait in local memory for the end of a loop; nothing in a loop does.
    Threshold("spilled", ("decode", "rows"), _NVIDIA, at_most=16, is_quantized=True),
    Threshold("spilled", ("prefill", "write"), _NVIDIA, at_most=0, is_quantized=True),
    Threshold("programs", ("decode",), _NVIDIA, at_least=2, dtypes=_HALF, dims=(64, 80, 96, 128), is_quantized=True),
    Threshold("buffers", _ATTENTION, _NVIDIA, at_least=2, anchor=_ONE_BUFFER, is_quantized=True),
    Threshold("waits", _ATTENTION, _NVIDIA, at_least=1, anchor="vLLM: 0", is_quantized=True),
    Threshold("wide", ("write",), _EVERYWHERE, at_least=1, is_quantized=True),
    Threshold("instructions", ("decode", "rows"), _NVIDIA, at_most=70, dtypes=_HALF, dims=(64, 80, 96, 128),
              max_group=16, anchor=f"{_VLLM_INT8}; {_CODES_FULL}", is_quantized=True),
    Threshold("instructions", ("prefill",), ("sm90", "sm100"), at_most=80, dtypes=_HALF, dims=(64, 80, 96, 128),
              is_quantized=True),
)  # fmt: skip
