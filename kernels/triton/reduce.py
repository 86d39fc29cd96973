"""The last step of split attention: the splits of a context become one result."""

import triton
import triton.language as tl

from .rows import split_tiles, tile_queries, visible_tokens
from .softmax import LOG2_E, LOWEST, inverse


@triton.jit
def reduce_kernel(
    partial_out, partial_lse, context_lens, cu_seqlens_q, sinks, out, num_rows, window, num_splits,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries, a KV head's tile of heads, and a row of their product."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = HEADS * BLOCK_Q
    tile, head_tile, product_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, first, count, position = tile_queries(tile, cu_seqlens_q, context_lens, num_rows, MAPPING, BLOCK_Q, MIN_Q)
    head = (head_tile % HEAD_TILES) * HEADS + product_row % HEADS
    if (product_row // HEADS >= count) | (head >= GROUP):
        return
    begin, end = visible_tokens(position, count, window, HAS_WINDOW)
    _, _, used_splits = split_tiles(begin, end, 0, num_splits, TILE)

    lanes = tl.arange(0, VALUE_LANES)
    splits = tl.arange(0, SPLITS)
    program = (tile * tl.num_programs(1) + head_tile).to(tl.int64) * num_splits
    head += head_tile // HEAD_TILES * GROUP
    maximum = tl.full((SPLITS,), LOWEST, tl.float32)
    total = tl.zeros((SPLITS,), tl.float32)
    summed = tl.zeros((SPLITS, VALUE_LANES), tl.float32)
    for start in range(0, used_splits, SPLITS):
        partial_row = (program + start + splits) * ROWS + product_row
        is_used = start + splits < used_splits
        lse = tl.load(partial_lse + partial_row, mask=is_used, other=float("-inf"))
        at = partial_row[:, None] * VALUE_DIM + lanes[None, :]
        shares = tl.load(partial_out + at, mask=is_used[:, None] & (lanes < VALUE_DIM)[None, :], other=0.0)
        larger = tl.maximum(maximum, lse)
        old, new = tl.exp2(maximum - larger), tl.exp2(lse - larger)
        summed = summed * old[:, None] + shares * new[:, None]
        total = total * old + new
        maximum = larger
    largest = tl.max(maximum, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    factor = tl.exp2(maximum - largest)
    whole = tl.sum(total * factor, 0)
    if HAS_SINKS:
        whole += tl.exp2(sink - largest)
    result = tl.sum(summed * factor[:, None], 0) * inverse(whole)
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    at = ((first + product_row // HEADS).to(tl.int64) * num_heads + head) * VALUE_DIM + lanes
    tl.store(out + at, result.to(out.dtype.element_ty), mask=lanes < VALUE_DIM)
