"""The op layer on Triton: the same functions as `ops`, for tensors on a GPU. See there for what they compute.

Nothing here waits for the device or reads a tensor, and shapes alone decide what is launched: a captured graph
replays with other lengths, tables and slots. Scratch comes from torch's allocator, which knows streams and graphs.
"""

import functools
import math

import torch

from .copy import copy_kernel
from .decode import decode_kernel
from .plan import Heads, Launch, attention_launches, describe, head_tiles, padded
from .prefill import prefill_kernel
from .reduce import reduce_kernel
from .write import write_kernel

_WRITE_ELEMENTS, _COPY_CHUNK, _REDUCE_SPLITS = 4096, 4096, 16


def _on_their_device(op):
    """Triton launches on the current device; the tensors may be on another one."""

    @functools.wraps(op)
    def call(*arguments, **options):
        device = arguments[0].device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return op(*arguments, **options)
        with torch.cuda.device(device):
            return op(*arguments, **options)

    return call


@_on_their_device
def write_kv(key, value, key_cache, value_cache, slot_mapping) -> None:
    """See `ops.write_kv`. A negative slot is not written."""
    num_tokens, num_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    if num_tokens == 0:
        return
    key, value = _dense_lanes(key), _dense_lanes(value)
    lanes = max(padded(key_dim), padded(value_dim))
    rows = max(1, _WRITE_ELEMENTS // lanes)
    grid = (-(-num_tokens * num_kv_heads // rows),)
    write_kernel[grid](
        key, value, key_cache, value_cache, slot_mapping.contiguous(), num_tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        NUM_KV_HEADS=num_kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_SIZE=key_cache.shape[2],
        KEY_STRIDES=key_cache.stride()[:3], VALUE_STRIDES=value_cache.stride()[:3],
        KEY_LANES=padded(key_dim), VALUE_LANES=padded(value_dim), ROWS=rows, num_warps=4,
    )  # fmt: skip


@_on_their_device
def copy_blocks(key_cache, value_cache, source, destination) -> None:
    """See `ops.copy_blocks`."""
    elements = [cache[0].numel() if len(cache) else 0 for cache in (key_cache, value_cache)]
    if len(source) == 0:
        return
    grid = (len(source), -(-max(elements) // _COPY_CHUNK))
    copy_kernel[grid](
        key_cache, value_cache, source.contiguous(), destination.contiguous(),
        key_cache.stride(0), value_cache.stride(0),
        KEY_ELEMENTS=elements[0], VALUE_ELEMENTS=elements[1], CHUNK=_COPY_CHUNK, num_warps=4,
    )  # fmt: skip


@_on_their_device
def paged_attention(
    query,
    key_cache,
    value_cache,
    block_tables,
    context_lens,
    cu_seqlens_q,
    scale,
    window=None,
    softcap=None,
    sinks=None,
) -> torch.Tensor:
    """See `ops.paged_attention`."""
    num_tokens, num_heads, key_dim = query.shape
    _, num_kv_heads, block_size, value_dim = value_cache.shape
    out = query.new_empty(num_tokens, num_heads, value_dim)
    if num_tokens == 0:
        return out
    if scale <= 0:  # The kernels take the maximum before they scale.
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query = _dense_lanes(query)
    block_tables = _dense_lanes(block_tables)
    heads = Heads(num_kv_heads, num_heads // num_kv_heads, key_dim, value_dim, block_size, query.element_size())
    num_rows, max_blocks = block_tables.shape
    device = describe(query.device)
    rows = (context_lens.contiguous(), cu_seqlens_q.contiguous())
    for launch in attention_launches(device, heads, num_tokens, num_rows, max_blocks * block_size):
        grid = (launch.tiles, head_tiles(heads, launch), launch.splits)
        scratch = _scratch(query, launch, grid, value_dim)
        shared = _compiled_in(heads, launch, window, sinks)
        kernel, geometry = (decode_kernel, _parts(launch)) if launch.parts else (prefill_kernel, {"TILE": launch.tile})
        kernel[grid](
            query, key_cache, value_cache, block_tables, *rows, sinks, out, *scratch,
            num_rows, block_tables.stride(0), query.stride(0), query.stride(1),
            scale * math.log2(math.e), softcap or 0.0, window or 0,
            KEY_DIM=key_dim, BLOCK_SIZE=block_size, KEY_LANES=padded(key_dim),
            KEY_STRIDES=key_cache.stride()[:3], VALUE_STRIDES=value_cache.stride()[:3], BLOCK_M=launch.block_m,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            HAS_SOFTCAP=softcap is not None, IS_SPLIT=launch.splits > 1, **shared, **geometry, **_options(launch),
        )  # fmt: skip
        if launch.splits > 1:
            reduce_kernel[(*grid[:2], launch.heads * launch.block_q)](
                *scratch, *rows, sinks, out, num_rows, window or 0, launch.splits,
                TILE=launch.tile, SPLITS=_REDUCE_SPLITS, num_warps=4, **shared,
            )  # fmt: skip
    return out


def write_and_attend(query, key, value, key_cache, value_cache, slot_mapping, *attention) -> torch.Tensor:
    """See `ops.write_and_attend`."""
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return paged_attention(query, key_cache, value_cache, *attention)


def _dense_lanes(states: torch.Tensor) -> torch.Tensor:
    """The kernels read whole vectors: the last dimension must be dense."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _scratch(query, launch: Launch, grid, value_dim: int):
    """Where splits leave their shares: outputs, and logarithms of their totals."""
    if launch.splits == 1:
        return None, None
    shape = (math.prod(grid), launch.heads * launch.block_q)
    return (
        torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device),
        torch.empty(shape, dtype=torch.float32, device=query.device),
    )


def _compiled_in(heads: Heads, launch: Launch, window, sinks) -> dict:
    return {
        "GROUP": heads.group,
        "VALUE_DIM": heads.value_dim,
        "VALUE_LANES": padded(heads.value_dim),
        "MAPPING": launch.mapping,
        "HEADS": launch.heads,
        "BLOCK_Q": launch.block_q,
        "MIN_Q": launch.min_q,
        "HAS_WINDOW": window is not None,
        "HAS_SINKS": sinks is not None,
    }


def _parts(launch: Launch) -> dict:
    return {"PARTS": launch.parts, "PART_TOKENS": launch.tile // launch.parts}


def _options(launch: Launch) -> dict:
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.max_registers:
        options["maxnreg"] = launch.max_registers
    return options
