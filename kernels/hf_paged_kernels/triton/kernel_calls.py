"""What each op launches: kernels with their grids and arguments, made from shapes alone. Nothing runs here.

Whoever wants to know what a call would do, without a GPU, compiles or counts what these functions return.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_paged_kernels.triton.kernels.copy import copy_kernel
from hf_paged_kernels.triton.kernels.decode import decode_kernel
from hf_paged_kernels.triton.kernels.prefill import prefill_kernel
from hf_paged_kernels.triton.kernels.reduce import reduce_kernel
from hf_paged_kernels.triton.kernels.write import write_kernel
from hf_paged_kernels.triton.launch_plan import (
    MAX_SPLITS,
    Device,
    Heads,
    Launch,
    attention_launches,
    head_tiles,
    padded,
)

_WRITE_ELEMENTS, _COPY_CHUNK = 4096, 4096
_SMALL = {"num_warps": 4, "enable_fp_fusion": True}  # Options of kernels that only move data.
_REDUCE = {"SPLITS": 16, "MAX_SPLITS": MAX_SPLITS, **_SMALL}


@dataclass(frozen=True)
class KernelCall:
    """One launch.

    Attributes
    ----------
    kernel : triton.JITFunction
    grid : tuple of int
    arguments : tuple
        In the kernel's order.
    options : dict
        What is compiled in, and the number of warps and stages.
    """

    kernel: Callable
    grid: tuple[int, ...]
    arguments: tuple
    options: dict

    def launch(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


def write_call(key, value, key_cache, value_cache, slot_mapping) -> KernelCall:
    """The launch of `write_kv`; there is at least one token."""
    num_tokens, num_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    key, value = dense_lanes(key), dense_lanes(value)
    rows = max(1, _WRITE_ELEMENTS // max(padded(key_dim), padded(value_dim)))
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    options = {
        "NUM_KV_HEADS": num_kv_heads,
        "ROWS": rows,
        **_SMALL,
        **_pages(key_cache, value_cache),
    }
    arguments = (key, value, key_cache, value_cache, slot_mapping.contiguous(), num_tokens, *strides)
    return KernelCall(write_kernel, (-(-num_tokens * num_kv_heads // rows),), arguments, options)


def copy_call(key_cache, value_cache, source, destination) -> KernelCall:
    """The launch of `copy_blocks`; there is at least one copy."""
    elements = [cache[0].numel() for cache in (key_cache, value_cache)]
    options = {"KEY_ELEMENTS": elements[0], "VALUE_ELEMENTS": elements[1], "CHUNK": _COPY_CHUNK, **_SMALL}
    blocks = (source.contiguous(), destination.contiguous())
    arguments = (key_cache, value_cache, *blocks, key_cache.stride(0), value_cache.stride(0))
    return KernelCall(copy_kernel, (len(source), -(-max(elements) // _COPY_CHUNK)), arguments, options)


def attention_calls(
    device: Device, out, query, key_cache, value_cache, block_tables, context_lens, cu_seqlens_q,
    scale, window=None, softcap=None, sinks=None,
) -> list[KernelCall]:  # fmt: skip
    """The launches of `paged_attention` into `out`, in order; there is at least one query."""
    num_tokens, num_heads, key_dim = query.shape
    _, num_kv_heads, block_size, value_dim = value_cache.shape
    if scale <= 0:  # The kernels take the maximum before they scale.
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query, block_tables = dense_lanes(query), dense_lanes(block_tables)
    rows = (context_lens.contiguous(), cu_seqlens_q.contiguous())
    num_rows, max_blocks = block_tables.shape
    heads = Heads(num_kv_heads, num_heads // num_kv_heads, key_dim, value_dim, block_size, query.element_size())
    numbers = (num_rows, block_tables.stride(0), query.stride(0), query.stride(1))
    factors = (scale * math.log2(math.e), softcap or 0.0, window or 0)
    calls = []
    for launch in attention_launches(device, heads, num_tokens, num_rows, max_blocks * block_size):
        grid = (launch.tiles, head_tiles(heads, launch), launch.splits)
        scratch = _scratch(query, launch, grid, value_dim)
        shared = {
            "GROUP": heads.group,
            "MAPPING": launch.mapping,
            "HEADS": launch.heads,
            "BLOCK_Q": launch.block_q,
            "MIN_Q": launch.min_q,
            "HAS_WINDOW": window is not None,
            "HAS_SINKS": sinks is not None,
        }
        options = {
            **shared,
            **_pages(key_cache, value_cache),
            **_tile(launch),
            "BLOCK_M": launch.block_m,
            # Plain multipliers serve float32: they would hold all queries in registers, so these stay in the cache.
            "RELOAD_QUERIES": query.dtype == torch.float32 and not device.is_hip,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            "HAS_SOFTCAP": softcap is not None,
            "IS_SPLIT": launch.splits > 1,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "enable_fp_fusion": True,
        }
        kernel = decode_kernel if launch.parts else prefill_kernel
        if kernel is prefill_kernel:
            # On sm90 the loop leaves registers over, and is 2% shorter if nothing is found again.
            options["FIND_ROWS_AGAIN"] = device.arch != "sm90"
        arguments = (query, key_cache, value_cache, block_tables, *rows, sinks, out, *scratch, *numbers, *factors)
        calls.append(KernelCall(kernel, grid, arguments, options))
        if launch.splits > 1:
            lanes = {"VALUE_DIM": value_dim, "VALUE_LANES": padded(value_dim)}
            options = {**shared, **lanes, "TILE": launch.tile, **_REDUCE}
            arguments = (*scratch, *rows, sinks, out, num_rows, window or 0, launch.splits)
            calls.append(KernelCall(reduce_kernel, (*grid[:2], launch.heads * launch.block_q), arguments, options))
    return calls


def dense_lanes(states: torch.Tensor) -> torch.Tensor:
    """The kernels read whole vectors: the last dimension must be dense."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _pages(key_cache, value_cache) -> dict:
    """What the caches' shapes and strides fix."""
    return {
        "KEY_DIM": key_cache.shape[3],
        "VALUE_DIM": value_cache.shape[3],
        "BLOCK_SIZE": key_cache.shape[2],
        "KEY_STRIDES": key_cache.stride()[:3],
        "VALUE_STRIDES": value_cache.stride()[:3],
        "KEY_LANES": padded(key_cache.shape[3]),
        "VALUE_LANES": padded(value_cache.shape[3]),
    }


def _tile(launch: Launch) -> dict:
    if launch.parts:
        return {"PARTS": launch.parts, "PART_TOKENS": launch.tile // launch.parts}
    return {"TILE": launch.tile}


def _scratch(query, launch: Launch, grid, value_dim: int):
    """Where splits leave their shares: outputs, and logarithms of their totals."""
    if launch.splits == 1:
        return None, None
    shape = (math.prod(grid), launch.heads * launch.block_q)
    return (
        torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device),
        torch.empty(shape, dtype=torch.float32, device=query.device),
    )
