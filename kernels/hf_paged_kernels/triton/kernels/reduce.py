"""The last step of split attention: the splits of a context become one result."""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.rows import extra_split, split_tiles, tile_queries, tiles_per_split, visible_tokens
from hf_paged_kernels.triton.device.softmax import LOG2_E, LOWEST, inverse


@triton.jit(
    do_not_specialize=["num_rows", "window", "num_extra"],
    do_not_specialize_on_alignment=["context_lens", "cu_seqlens_q", "sinks"],
)
def reduce_kernel(
    partial_out, partial_lse, context_lens, cu_seqlens_q, sinks, out, num_rows, window, num_extra,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, TILE: tl.constexpr,
    MIN_TILES: tl.constexpr, SPLITS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program per extra split, tile of a KV head's query heads, and row of their product.

    The first extra split of a tile of queries adds up all that the tile has; tiles without one have their result.

    The totals of all splits are read first: once the largest is known, the shares need no running maximum and no
    rescaling, which would take registers that the shares themselves need.
    """
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = HEADS * BLOCK_Q
    number, head_tile, product_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tiles_per_split(
        num_extra, cu_seqlens_q, context_lens, num_rows, window,
        MAPPING, BLOCK_Q, MIN_Q, TILE, MIN_TILES, HAS_WINDOW,
    )  # fmt: skip
    row, index, split, num_splits = extra_split(
        number, tiles, cu_seqlens_q, context_lens, num_rows, window,
        MAPPING, BLOCK_Q, MIN_Q, TILE, MAX_SPLITS, HAS_WINDOW,
    )  # fmt: skip
    first, count, position = tile_queries(row, index, cu_seqlens_q, context_lens, num_rows, MAPPING, BLOCK_Q, MIN_Q)
    head = (head_tile % HEAD_TILES) * HEADS + product_row % HEADS
    if (split > 1) | (product_row // HEADS >= count) | (head >= GROUP):
        return
    begin, end = visible_tokens(position, count, window, HAS_WINDOW)
    _, _, used_splits = split_tiles(begin, end, 0, num_splits, TILE)

    head += head_tile // HEAD_TILES * GROUP
    all_splits = tl.arange(0, MAX_SPLITS)
    lse_at = partial_lse + _share(all_splits, number, num_extra, head_tile, product_row, ROWS)
    lse = tl.load(lse_at, mask=all_splits < used_splits, other=float("-inf"))
    largest = tl.maximum(tl.max(lse, 0), LOWEST)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.exp2(lse - largest), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - largest)

    lanes = tl.arange(0, VALUE_LANES)
    splits = tl.arange(0, SPLITS)
    summed = tl.zeros((SPLITS, VALUE_LANES), tl.float32)
    for start in range(0, used_splits, SPLITS):
        is_used = start + splits < used_splits
        at = _share(start + splits, number, num_extra, head_tile, product_row, ROWS)
        weights = tl.exp2(tl.load(partial_lse + at, mask=is_used, other=float("-inf")) - largest)
        is_share = is_used[:, None] & (lanes < VALUE_DIM)[None, :]
        shares = tl.load(partial_out + at[:, None] * VALUE_DIM + lanes[None, :], mask=is_share, other=0.0)
        summed += shares * weights[:, None]
    result = tl.sum(summed, 0) * inverse(total)
    num_heads = tl.num_programs(1) // HEAD_TILES * GROUP
    at = ((first + product_row // HEADS).to(tl.int64) * num_heads + head) * VALUE_DIM + lanes
    tl.store(out + at, result.to(out.dtype.element_ty), mask=lanes < VALUE_DIM)


@triton.jit
def _share(splits, number, num_extra, head_tile, product_row, ROWS: tl.constexpr):
    """Where splits of a tile of queries left their shares of a product row; `number` is its first extra split's."""
    slots = tl.where(splits == 0, num_extra + number, number + splits - 1)
    return (slots * tl.num_programs(1) + head_tile).to(tl.int64) * ROWS + product_row
