"""Kernel calls: the kernels of each op with their grids and arguments, made from shapes alone. Nothing runs here.

Without a GPU the calls that these functions return can still be compiled, interpreted or counted.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_paged_kernels.quantized import LARGEST_CODE, rotate, rotated_size
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
_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # A tensor's shape and strides.


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
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> KernelCall:
    """The kernel call of `write_kv`; there is at least one token."""
    num_tokens, num_kv_heads, _ = key.shape
    key, value = dense_lanes(key), dense_lanes(value)
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    pages = (_bytes(key_cache), _bytes(value_cache), key_scales, value_scales)
    options = _write_options(key.dtype, *map(_layout, pages))
    arguments = (key, value, *pages, slot_mapping.contiguous(), num_tokens, *strides)
    return KernelCall(write_kernel, (-(-num_tokens * num_kv_heads // options["ROWS"]),), arguments, options)


def copy_call(
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    source: torch.Tensor,  # [num_copies] int64
    destination: torch.Tensor,  # [num_copies] int64
) -> KernelCall:
    """The kernel call of `copy_blocks`; there is at least one copy."""
    key_cache, value_cache = _bytes(key_cache), _bytes(value_cache)
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
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> list[KernelCall]:
    """The kernel calls of `paged_attention` into `out`, in order; there is at least one query."""
    num_tokens, num_rows, max_context = len(query), len(context_lens), block_tables.shape[1] * key_cache.shape[2]
    heads = heads_of(query, value_cache)
    plans = attention_plans(device, heads, num_tokens, num_rows, max_context, window)
    return planned_calls(
        device, heads, plans, out, query, key_cache, value_cache,
        block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks, key_scales, value_scales,
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
    key_scales: torch.Tensor | None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> list[KernelCall]:
    """The kernel calls of these plans."""
    if scale <= 0:  # The kernels take the maximum before they scale.
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query, block_tables = dense_lanes(query), dense_lanes(block_tables)
    plans = list(plans)
    rotated = None
    if key_scales is not None and any(_is_rotated_before(device, plan, heads, query.dtype) for plan in plans):
        rotated = rotate(query).to(query.dtype)
    rows = (context_lens.contiguous(), cu_seqlens_q.contiguous())
    cached = (_bytes(key_cache), _bytes(value_cache), key_scales, value_scales)
    tensors = (*cached, block_tables, *rows, sinks, out)
    factors = (scale * math.log2(math.e), softcap or 0.0, window or 0)
    pages = tuple(map(_layout, cached))
    has = (window is not None, softcap is not None, sinks is not None)
    calls = []
    for plan in plans:
        num_head_tiles = head_tiles(heads, plan)
        kernel, options, reduce_options = _compiled_in(device, plan, heads, query.dtype, pages, has)
        scratch = _scratch(query, plan, num_head_tiles, heads.value_dim)
        read = query if options["ROTATION"] > 1 or rotated is None else rotated
        numbers = (len(context_lens), block_tables.stride(0), read.stride(0), read.stride(1))
        arguments = (read, *tensors, *scratch, *numbers, *factors, plan.extra)
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
    plan: AttentionPlan, heads: Heads, dtype: torch.dtype, strides: tuple[tuple[int, ...], ...], has_window: bool
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
    is_quantized = value_cache.dtype in LARGEST_CODE
    sizes = (num_kv_heads, num_heads // num_kv_heads, key_dim, value_dim, block_size)
    return Heads(*sizes, query.element_size(), is_quantized=is_quantized)


def dense_lanes(states: torch.Tensor) -> torch.Tensor:
    """The kernels read whole vectors: the last dimension must be dense."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _bytes(cache: torch.Tensor) -> torch.Tensor:
    """A cache as the kernels read it: see `codes` for why float8 is bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _layout(tensor: torch.Tensor | None) -> _Layout | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


def _pages(keys: _Layout, values: _Layout, key_scales: _Layout | None, value_scales: _Layout | None) -> dict[str, Any]:
    """The options that the layouts of pages and of their scales fix."""
    return {
        "KEY_DIM": keys[0][3],
        "VALUE_DIM": values[0][3],
        "BLOCK_SIZE": keys[0][2],
        "KEY_STRIDES": keys[1][:3],
        "VALUE_STRIDES": values[1][:3],
        "KEY_LANES": padded(keys[0][3]),
        "VALUE_LANES": padded(values[0][3]),
        "KEY_SCALE_STRIDES": key_scales and key_scales[1][:3],
        "VALUE_SCALE_STRIDES": value_scales and value_scales[1][:3],
    }


@functools.lru_cache(maxsize=256)  # All layers of a step ask for the same few.
def _write_options(dtype: torch.dtype, *pages: _Layout) -> dict[str, Any]:
    """The numbers that are compiled into the writing kernel, for `_pages`."""
    options = _pages(*pages)
    rows = max(1, _WRITE_ELEMENTS // max(options["KEY_LANES"], options["VALUE_LANES"]))
    rotation = rotated_size(options["KEY_DIM"]) if pages[2] is not None else 1
    return {
        "NUM_KV_HEADS": pages[0][0][1],
        "ROTATION": rotation,
        "PRECISION": _precision(dtype),
        "ROWS": rows,
        **_SMALL,
        **options,
    }


def _is_rotated_before(device: Device, plan: AttentionPlan, heads: Heads, dtype: torch.dtype) -> bool:
    """Tell whether the queries of quantised pages are rotated in launches of their own.

    Kernels that read their queries again and again would have to rotate them each time. And the rotation of a tile of
    many large heads takes more registers than there are.
    """
    return _is_plain(device, dtype) or (plan.kernel == "prefill" and heads.lanes > 128)


def _is_plain(device: Device, dtype: torch.dtype) -> bool:
    """Tell whether products in a dtype are made by plain multipliers, without tensor cores."""
    return dtype == torch.float32 and not device.is_hip


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@functools.lru_cache(maxsize=256)
def _compiled_in(
    device: Device,
    plan: AttentionPlan,
    heads: Heads,
    dtype: torch.dtype,
    pages: tuple[_Layout, _Layout, _Layout | None, _Layout | None],
    has: tuple[bool, bool, bool],
) -> tuple[Kernel, dict[str, Any], dict[str, Any]]:
    """The kernel of a plan, and the options of it and of the reduction.

    Parameters
    ----------
    pages : tuple
        Shape and strides of the key cache, the value cache and their scales.
    has : tuple of bool
        Window, softcap, sinks.
    """
    is_rotated = pages[2] is None or _is_rotated_before(device, plan, heads, dtype)
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
        "RELOAD_QUERIES": _is_plain(device, dtype),
        "ROTATION": 1 if is_rotated else rotated_size(heads.key_dim),
        "PRECISION": _precision(dtype),
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
