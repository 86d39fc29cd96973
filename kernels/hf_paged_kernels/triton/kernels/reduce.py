"""The last step of split attention: the splits of a context become one result."""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.rows import split_tiles, tile_queries, visible_tokens
from hf_paged_kernels.triton.device.softmax import LOG2_E, LOWEST, inverse


@triton.jit
def reduce_kernel(
    partial_out, partial_lse, context_lens, cu_seqlens_q, sinks, out, num_rows, window, num_splits,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, MAX_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, tile of a KV head's query heads, and row of their product.

    The totals of all splits are read first: once the largest is known, the shares need no running maximum and no
    rescaling, which would take registers that the shares themselves need.
    """
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = HEADS * BLOCK_Q
    tile, head_tile, product_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, first, count, position = tile_queries(tile, cu_seqlens_q, context_lens, num_rows, MAPPING, BLOCK_Q, MIN_Q)
    head = (head_tile % HEAD_TILES) * HEADS + product_row % HEADS
    if (product_row // HEADS >= count) | (head >= GROUP):
        return
    begin, end = visible_tokens(position, count, window, HAS_WINDOW)
    _, _, used_splits = split_tiles(begin, end, 0, num_splits, TILE)

    first_row = (tile * tl.num_programs(1) + head_tile).to(tl.int64) * num_splits * ROWS + product_row
    partial_out += first_row * VALUE_DIM
    partial_lse += first_row
    head += head_tile // HEAD_TILES * GROUP
    all_splits = tl.arange(0, MAX_SPLITS)
    lse = tl.load(partial_lse + all_splits * ROWS, mask=all_splits < used_splits, other=float("-inf"))
    largest = tl.maximum(tl.max(lse, 0), LOWEST)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.exp2(lse - largest), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - largest)

    lanes = tl.arange(0, VALUE_LANES)
    splits = tl.arange(0, SPLITS)
    lse_at = partial_lse + splits * ROWS
    shares_at = partial_out + (splits[:, None] * (ROWS * VALUE_DIM) + lanes[None, :])
    summed = tl.zeros((SPLITS, VALUE_LANES), tl.float32)
    for start in range(0, used_splits, SPLITS):
        is_used = start + splits < used_splits
        weights = tl.exp2(tl.load(lse_at + start * ROWS, mask=is_used, other=float("-inf")) - largest)
        is_share = is_used[:, None] & (lanes < VALUE_DIM)[None, :]
        shares = tl.load(shares_at + start * (ROWS * VALUE_DIM), mask=is_share, other=0.0)
        summed += shares * weights[:, None]
    result = tl.sum(summed, 0) * inverse(total)
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    at = ((first + product_row // HEADS).to(tl.int64) * num_heads + head) * VALUE_DIM + lanes
    tl.store(out + at, result.to(out.dtype.element_ty), mask=lanes < VALUE_DIM)
