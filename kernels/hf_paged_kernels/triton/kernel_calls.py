"""Kernel calls: the kernels of each op with their grids and arguments, made from shapes alone. Nothing runs here.

Without a GPU the calls that these functions return can still be compiled, interpreted or counted.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_paged_kernels.triton.kernels.copy import copy_kernel
from hf_paged_kernels.triton.kernels.decode import decode_kernel
from hf_paged_kernels.triton.kernels.latent import latent_kernel
from hf_paged_kernels.triton.kernels.prefill import prefill_kernel
from hf_paged_kernels.triton.kernels.reduce import reduce_kernel
from hf_paged_kernels.triton.kernels.write import write_kernel
from hf_paged_kernels.triton.launch_plan import (
    MAX_SPLITS,
    AttentionPlan,
    Device,
    Heads,
    attention_plans,
    head_tiles,
    padded,
)

_WRITE_ELEMENTS, _COPY_CHUNK = 4096, 4096
_SMALL = {"num_warps": 4, "enable_fp_fusion": True}  # Options of kernels that only move data.
_REDUCE = {"SPLITS": 16, **_SMALL}
_Sizes = tuple[int, ...]  # Of a tensor's dimensions, or its strides.


class Kernel(Protocol):
    """A kernel of Triton: indexed by a grid, it can be called; `warmup` compiles it."""

    __name__: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any: ...


@dataclass(slots=True)
class KernelCall:
    """A kernel with all that it is launched with.

    Attributes
    ----------
    kernel : triton.JITFunction
    grid : tuple of int
        Programs along each axis.
    arguments : tuple
        In the kernel's order.
    options : dict
        The numbers that are compiled in, and those of warps and stages.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    def launch(self) -> None:
        """Start the kernel on the current device, on torch's current stream."""
        self.kernel[self.grid](*self.arguments, **self.options)


def write_call(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
) -> KernelCall:
    """The kernel call of `write_kv`; there is at least one token."""
    num_tokens, num_kv_heads, _ = key.shape
    key, value = dense_lanes(key), dense_lanes(value)
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    options = _write_options(key_cache.shape, key_cache.stride(), value_cache.shape, value_cache.stride())
    arguments = (key, value, key_cache, value_cache, slot_mapping.contiguous(), num_tokens, *strides)
    return KernelCall(write_kernel, (-(-num_tokens * num_kv_heads // options["ROWS"]),), arguments, options)


def copy_call(
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    source: torch.Tensor,  # [num_copies] int64
    destination: torch.Tensor,  # [num_copies] int64
) -> KernelCall:
    """The kernel call of `copy_blocks`; there is at least one copy."""
    elements = [cache[0].numel() for cache in (key_cache, value_cache)]
    options = {"KEY_ELEMENTS": elements[0], "VALUE_ELEMENTS": elements[1], "CHUNK": _COPY_CHUNK, **_SMALL}
    blocks = (source.contiguous(), destination.contiguous())
    arguments = (key_cache, value_cache, *blocks, key_cache.stride(0), value_cache.stride(0))
    return KernelCall(copy_kernel, (len(source), -(-max(elements) // _COPY_CHUNK)), arguments, options)


def attention_calls(
    device: Device,
    out: torch.Tensor,  # [num_tokens, num_heads, value_dim], contiguous
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> list[KernelCall]:
    """The kernel calls of `paged_attention` into `out`, in order; there is at least one query."""
    num_tokens, num_rows, max_context = len(query), len(context_lens), block_tables.shape[1] * key_cache.shape[2]
    heads = heads_of(query, value_cache)
    plans = attention_plans(device, heads, num_tokens, num_rows, max_context, window)
    return planned_calls(
        device, heads, plans, out, query, key_cache, value_cache,
        block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
    )  # fmt: skip


def planned_calls(
    device: Device,
    heads: Heads,
    plans: Iterable[AttentionPlan],
    out: torch.Tensor,  # [num_tokens, num_heads, value_dim], contiguous
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [num_heads]
) -> list[KernelCall]:
    """The kernel calls of these plans."""
    if scale <= 0:  # The kernels take the maximum before they scale.
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query, block_tables = dense_lanes(query), dense_lanes(block_tables)
    rows = (context_lens.contiguous(), cu_seqlens_q.contiguous())
    tensors = (query, key_cache, value_cache, block_tables, *rows, sinks, out)
    numbers = (len(context_lens), block_tables.stride(0), query.stride(0), query.stride(1))
    factors = (scale * math.log2(math.e), softcap or 0.0, window or 0)
    pages = (key_cache.shape, key_cache.stride(), value_cache.shape, value_cache.stride())
    has = (window is not None, softcap is not None, sinks is not None)
    calls = []
    for plan in plans:
        num_head_tiles = head_tiles(heads, plan)
        kernel, options, reduce_options = _compiled_in(device, plan, heads, query.dtype, pages, has)
        scratch = _scratch(query, plan, num_head_tiles, heads.value_dim)
        arguments = (*tensors, *scratch, *numbers, *factors, plan.extra)
        calls.append(KernelCall(kernel, (plan.extra + plan.tiles, num_head_tiles), arguments, options))
        if plan.extra:
            shares = (*scratch, *rows, sinks, out, len(context_lens), window or 0, plan.extra)
            grid = (plan.extra, num_head_tiles, plan.heads * plan.block_q)
            calls.append(KernelCall(reduce_kernel, grid, shares, reduce_options))
    return calls


def latent_calls(
    device: Device,
    out: torch.Tensor,  # [num_tokens, num_heads, rank], contiguous
    query_latent: torch.Tensor,  # [num_tokens, num_heads, rank]
    query_rope: torch.Tensor,  # [num_tokens, num_heads, rope_dim]
    latent_cache: torch.Tensor,  # [num_blocks, 1, block_size, rank]
    rope_cache: torch.Tensor,  # [num_blocks, 1, block_size, rope_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None = None,
) -> list[KernelCall]:
    """The kernel calls of `latent_attention` into `out`, in order; there is at least one query."""
    num_tokens, num_rows, max_context = len(out), len(context_lens), block_tables.shape[1] * latent_cache.shape[2]
    heads = latent_heads_of(query_latent, rope_cache)
    plans = attention_plans(device, heads, num_tokens, num_rows, max_context, window)
    return planned_latent_calls(
        device, heads, plans, out, query_latent, query_rope, latent_cache, rope_cache,
        block_tables, context_lens, cu_seqlens_q, scale, window,
    )  # fmt: skip


def planned_latent_calls(
    device: Device,
    heads: Heads,
    plans: Iterable[AttentionPlan],
    out: torch.Tensor,  # [num_tokens, num_heads, rank], contiguous
    query_latent: torch.Tensor,  # [num_tokens, num_heads, rank]
    query_rope: torch.Tensor,  # [num_tokens, num_heads, rope_dim]
    latent_cache: torch.Tensor,  # [num_blocks, 1, block_size, rank]
    rope_cache: torch.Tensor,  # [num_blocks, 1, block_size, rope_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None,
) -> list[KernelCall]:
    """The kernel calls of these plans."""
    if scale <= 0:  # The kernel takes the maximum before it scales.
        query_latent, query_rope = (
            -query if scale else torch.zeros_like(query) for query in (query_latent, query_rope)
        )
        scale = -scale or 1.0
    queries = (dense_lanes(query_latent), dense_lanes(query_rope))
    block_tables = dense_lanes(block_tables)
    rows = (context_lens.contiguous(), cu_seqlens_q.contiguous())
    strides = tuple(query.stride(axis) for query in queries for axis in range(2))
    pages = (latent_cache.stride()[:3], rope_cache.stride()[:3])
    calls = []
    for plan in plans:
        num_head_tiles = head_tiles(heads, plan)
        options, reduce_options = _latent_options(plan, heads, query_latent.dtype, pages, window is not None)
        scratch = _scratch(query_latent, plan, num_head_tiles, heads.value_dim)
        arguments = (
            *queries, latent_cache, rope_cache, block_tables, *rows, out, *scratch, len(context_lens),
            block_tables.stride(0), *strides, scale * math.log2(math.e), window or 0, plan.extra,
        )  # fmt: skip
        calls.append(KernelCall(latent_kernel, (plan.extra + plan.tiles, num_head_tiles), arguments, options))
        if plan.extra:
            shares = (*scratch, *rows, None, out, len(context_lens), window or 0, plan.extra)
            grid = (plan.extra, num_head_tiles, plan.heads * plan.block_q)
            calls.append(KernelCall(reduce_kernel, grid, shares, reduce_options))
    return calls


def latent_heads_of(query_latent: torch.Tensor, rope_cache: torch.Tensor) -> Heads:
    """The sizes that a call's tensors have, where one latent is the key and the value of every head."""
    _, num_heads, rank = query_latent.shape
    _, _, block_size, rope_dim = rope_cache.shape
    return Heads(1, num_heads, rank, rank, block_size, query_latent.element_size(), rope_dim)


@functools.lru_cache(maxsize=256)
def _latent_options(
    plan: AttentionPlan, heads: Heads, dtype: torch.dtype, strides: tuple[_Sizes, _Sizes], has_window: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the latent kernel of a plan, and of the reduction; `strides` are those of both caches."""
    shared: dict[str, Any] = {
        "GROUP": heads.group,
        "MAPPING": plan.mapping,
        "HEADS": plan.heads,
        "BLOCK_Q": plan.block_q,
        "MIN_Q": plan.min_q,
        "TILE": plan.tile,
        "MIN_TILES": plan.min_tiles,
        "MAX_SPLITS": MAX_SPLITS,
        "HAS_WINDOW": has_window,
    }
    options = {
        **shared,
        "RANK": heads.key_dim,
        "ROPE_DIM": heads.rope_dim,
        "BLOCK_SIZE": heads.block_size,
        "LATENT_STRIDES": strides[0],
        "ROPE_STRIDES": strides[1],
        "RANK_LANES": padded(heads.key_dim),
        "ROPE_LANES": padded(heads.rope_dim),
        "BLOCK_M": plan.block_m,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "IS_SPLIT": plan.extra > 0,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,
    }
    lanes = {"VALUE_DIM": heads.value_dim, "VALUE_LANES": padded(heads.value_dim), "HAS_SINKS": False}
    return options, {**shared, **lanes, **_REDUCE}


def heads_of(query: torch.Tensor, value_cache: torch.Tensor) -> Heads:
    """The sizes of heads that a call's tensors have."""
    _, num_heads, key_dim = query.shape
    _, num_kv_heads, block_size, value_dim = value_cache.shape
    return Heads(num_kv_heads, num_heads // num_kv_heads, key_dim, value_dim, block_size, query.element_size())


def dense_lanes(states: torch.Tensor) -> torch.Tensor:
    """The kernels read whole vectors: the last dimension must be dense."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _pages(key_shape: _Sizes, key_strides: _Sizes, value_shape: _Sizes, value_strides: _Sizes) -> dict[str, Any]:
    """The options that the caches' shapes and strides fix."""
    return {
        "KEY_DIM": key_shape[3],
        "VALUE_DIM": value_shape[3],
        "BLOCK_SIZE": key_shape[2],
        "KEY_STRIDES": key_strides[:3],
        "VALUE_STRIDES": value_strides[:3],
        "KEY_LANES": padded(key_shape[3]),
        "VALUE_LANES": padded(value_shape[3]),
    }


@functools.lru_cache(maxsize=256)  # All layers of a step ask for the same few.
def _write_options(*pages: _Sizes) -> dict[str, Any]:
    """The numbers that are compiled into the writing kernel, for `_pages`."""
    options = _pages(*pages)
    rows = max(1, _WRITE_ELEMENTS // max(options["KEY_LANES"], options["VALUE_LANES"]))
    return {"NUM_KV_HEADS": pages[0][1], "ROWS": rows, **_SMALL, **options}


@functools.lru_cache(maxsize=256)
def _compiled_in(
    device: Device,
    plan: AttentionPlan,
    heads: Heads,
    dtype: torch.dtype,
    pages: tuple[_Sizes, _Sizes, _Sizes, _Sizes],
    has: tuple[bool, bool, bool],
) -> tuple[Kernel, dict[str, Any], dict[str, Any]]:
    """The kernel of a plan, and the options of it and of the reduction.

    Parameters
    ----------
    pages : tuple
        Shape and strides of the key cache, then of the value cache.
    has : tuple of bool
        Window, softcap, sinks.
    """
    shared: dict[str, Any] = {
        "GROUP": heads.group,
        "MAPPING": plan.mapping,
        "HEADS": plan.heads,
        "BLOCK_Q": plan.block_q,
        "MIN_Q": plan.min_q,
        "MIN_TILES": plan.min_tiles,
        "MAX_SPLITS": MAX_SPLITS,
        "HAS_WINDOW": has[0],
        "HAS_SINKS": has[2],
    }
    options = {
        **shared,
        **_pages(*pages),
        "HAS_SOFTCAP": has[1],
        "BLOCK_M": plan.block_m,
        # Plain multipliers serve float32: they would hold all queries in registers, so these stay in the cache.
        "RELOAD_QUERIES": dtype == torch.float32 and not device.is_hip,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "IS_SPLIT": plan.extra > 0,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,
    }
    if plan.parts:
        options.update(PARTS=plan.parts, PART_TOKENS=plan.tile // plan.parts)
    else:
        # On sm90 the loop leaves registers over, and is 2% shorter if nothing is found again.
        options.update(TILE=plan.tile, FIND_ROWS_AGAIN=device.arch != "sm90")
    lanes = {"VALUE_DIM": heads.value_dim, "VALUE_LANES": padded(heads.value_dim)}
    return decode_kernel if plan.parts else prefill_kernel, options, {**shared, **lanes, "TILE": plan.tile, **_REDUCE}


def _scratch(
    query: torch.Tensor, plan: AttentionPlan, num_head_tiles: int, value_dim: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the shares of splits: their outputs, and the logarithms of their totals. None without splits.

    A tile of queries has a first split beside its extra ones, so twice the extra ones is enough for all.
    """
    if not plan.extra:
        return None, None
    shape = (2 * plan.extra * num_head_tiles, plan.heads * plan.block_q)
    return (
        torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device),
        torch.empty(shape, dtype=torch.float32, device=query.device),
    )
