"""The kernels to compile: every op over head sizes, block sizes, dtypes, groups and options."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_paged_evals.triton.targets import TARGETS, Target
from hf_paged_kernels.triton.kernel_calls import KernelCall, attention_calls, copy_call, latent_calls, write_call
from hf_paged_kernels.triton.launch_plan import BY_TILE, BY_TOKEN

HEAD_DIMS, BLOCK_SIZES = (64, 80, 96, 128, 256), (16, 32, 64, 128)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_ROWS, _CONTEXT = 64, 4096


@dataclass(frozen=True)
class Case:
    """One compiled kernel.

    Attributes
    ----------
    kernel : str
        ``decode`` (one query per row), ``rows`` (decode of rows with a few queries), ``prefill``, ``reduce``,
        ``write`` or ``copy``; ``latent`` (one query per row) and ``latent_tiles`` (rows of many) of `latent_attention`.
    dtype : str
    dims : tuple of int
        Key and value head size; rank and size of the rope part of latents.
    block_size, group, num_kv_heads : int
    is_full : bool
        With window, softcap and sinks.
    codes : str or None
        Of quantised pages, ``int8`` or ``fp8``.
    """

    kernel: str
    dtype: str = "bf16"
    dims: tuple[int, int] = (128, 128)
    block_size: int = 16
    group: int = 4
    num_kv_heads: int = 8
    is_full: bool = False
    codes: str | None = None

    def __str__(self) -> str:
        dims = str(self.dims[0]) if self.dims[0] == self.dims[1] else f"{self.dims[0]}/{self.dims[1]}"
        options = ", window+softcap+sinks" if self.is_full else ""
        dtype = f"{self.dtype}, {self.codes} pages," if self.codes else self.dtype
        return f"{self.kernel} {dtype} head {dims} block {self.block_size} GQA {self.group}{options}"

    def call(self, target: Target) -> KernelCall:
        """The launch of this kernel on a target."""
        dtype, heads = DTYPES[self.dtype], self.num_kv_heads
        # The pool that launches are compiled for is made of addresses alone: no byte of it is read.
        held = CODES[self.codes] if self.codes else dtype
        caches = [torch.empty(1, heads, self.block_size, dim, dtype=held) for dim in self.dims]
        names = ("key_scales", "value_scales") if self.codes else ()
        scales = {name: torch.empty(1, heads, self.block_size, 1) for name in names}
        numbers = torch.zeros(_ROWS, dtype=torch.long)
        if self.kernel == "write":
            states = [torch.empty(_ROWS, heads, dim, dtype=dtype) for dim in self.dims]
            return write_call(*states, *caches, numbers, **scales)
        if self.kernel == "copy":
            return copy_call(*caches, numbers, numbers)
        if self.kernel.startswith("latent"):
            return self._latent_call(target, caches, numbers)
        num_rows = 1 if self.kernel == "reduce" else _ROWS
        num_tokens = num_rows if self.kernel in ("decode", "reduce") else 32 * num_rows
        query = torch.empty(num_tokens, heads * self.group, self.dims[0], dtype=dtype)
        out = query.new_empty(*query.shape[:2], self.dims[1])
        tables = torch.zeros(num_rows, _CONTEXT // self.block_size, dtype=torch.long)
        starts = torch.zeros(num_rows + 1, dtype=torch.long)
        options: dict[str, Any] = dict(scales)
        if self.is_full:
            options |= {"window": 1000, "softcap": 30.0, "sinks": torch.empty(heads * self.group, dtype=dtype)}
        arguments = (out, query, *caches, tables, numbers[:num_rows], starts, 0.1)
        calls = attention_calls(target.device, *arguments, **options)
        return next(call for call in calls if self._is(call))

    def _latent_call(self, target: Target, caches: list[torch.Tensor], numbers: torch.Tensor) -> KernelCall:
        num_tokens = _ROWS if self.kernel == "latent" else 32 * _ROWS
        queries = [torch.empty(num_tokens, self.group, dim, dtype=DTYPES[self.dtype]) for dim in self.dims]
        tables, starts = (
            torch.zeros(_ROWS, _CONTEXT // self.block_size, dtype=torch.long),
            torch.zeros(_ROWS + 1).long(),
        )
        window = 1000 if self.is_full else None
        arguments = (torch.empty_like(queries[0]), *queries, *caches, tables, numbers, starts, 0.1, window)
        mapping = BY_TOKEN if self.kernel == "latent" else BY_TILE
        calls = latent_calls(target.device, *arguments)
        return next(call for call in calls if call.options["MAPPING"] == mapping)

    def _is(self, call: KernelCall) -> bool:
        if self.kernel == "rows":
            return call.kernel.__name__ == "decode_kernel" and call.options["MAPPING"] != BY_TOKEN
        return call.kernel.__name__ == f"{self.kernel}_kernel"


def all_cases() -> list[Case]:
    """Every head size in every dtype, every block size, groups and options; not their whole product."""
    attention, movers = ("decode", "prefill"), ("reduce", "write", "copy")
    cases = [Case(kernel, dtype, (dim, dim)) for kernel in attention for dtype in DTYPES for dim in HEAD_DIMS]
    cases += [Case(kernel, block_size=size) for kernel in attention for size in BLOCK_SIZES[1:]]
    cases += [Case(kernel, group=group) for kernel in attention for group in (1, 8)]
    cases += [Case(kernel, is_full=True) for kernel in (*attention, "rows")]
    cases += [Case(kernel, dims=(192, 128), group=1) for kernel in attention]
    cases += [Case("prefill", dtype, (dim, dim), group=8) for dtype in ("bf16", "fp16") for dim in (320, 512)]
    cases += [Case("rows"), Case("decode", group=24), Case("prefill", group=48)]
    cases += [_latents(kernel, group=group) for kernel in ("latent", "latent_tiles") for group in (16, 128)]
    cases += [_latents(kernel, is_full=True) for kernel in ("latent", "latent_tiles")]
    cases += [_latents("latent", dims=(256, 32)), _latents("latent", "fp32", dims=(256, 32))]
    cases += [Case(kernel, dtype, (dim, dim)) for kernel in movers for dtype in ("bf16", "fp32") for dim in (80, 128)]
    for codes in CODES:
        cases += [Case(kernel, dims=(dim, dim), codes=codes) for kernel in attention for dim in HEAD_DIMS]
        cases += [Case(kernel, dtype, codes=codes) for kernel in attention for dtype in ("fp16", "fp32")]
        cases += [Case(kernel, is_full=True, codes=codes) for kernel in (*attention, "rows")]
        cases += [Case(kernel, block_size=64, codes=codes) for kernel in attention]
        cases += [Case("write", dtype, (dim, dim), codes=codes) for dtype in ("bf16", "fp32") for dim in (80, 128)]
        cases += [Case("prefill", dims=(512, 512), group=8, codes=codes)]
    return cases


def _latents(kernel: str, dtype: str = "bf16", dims: tuple[int, int] = (512, 64), group: int = 16, **options) -> Case:
    return Case(kernel, dtype, dims, group=group, num_kv_heads=1, **options)


def few_cases() -> list[tuple[Case, Target]]:
    """The cases that the tests compile: each kernel once, and the bounds that matter most."""
    sm80, sm90, sm100, gfx942 = TARGETS.values()
    return [
        (Case("decode"), sm80),
        (Case("decode"), sm90),
        (Case("decode"), sm100),
        (Case("decode"), gfx942),
        (Case("rows", is_full=True), sm90),
        (Case("prefill"), sm90),
        (Case("prefill"), sm80),
        (Case("prefill", dims=(80, 80)), sm100),
        (Case("prefill", dims=(512, 512), group=8), sm80),
        (_latents("latent"), sm80),
        (_latents("latent", group=128), sm90),
        (_latents("latent_tiles"), sm90),
        (Case("reduce"), sm100),
        (Case("write"), sm80),
        (Case("copy"), gfx942),
        (Case("decode", codes="int8"), sm90),
        (Case("decode", codes="fp8"), sm80),
        (Case("rows", is_full=True, codes="fp8"), sm90),
        (Case("prefill", codes="int8"), sm90),
        (Case("prefill", codes="fp8"), sm80),
        (Case("write", codes="fp8"), gfx942),
    ]
