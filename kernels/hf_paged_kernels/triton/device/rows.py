"""The queries that a program serves, and the tokens of their row that it reads: device code of all kernels.

Lengths are read on the device, so a captured graph may be replayed with other ones; the host knows shapes alone.
"""

import triton
import triton.language as tl

BY_TOKEN = tl.constexpr(0)  # A tile is one query, of whatever row.
BY_ROW = tl.constexpr(1)  # A tile is a row of few queries; rows of more are left to another kernel.
BY_TILE = tl.constexpr(2)  # A tile is up to BLOCK_Q queries of a row; rows of few are left to another kernel.


@triton.jit
def tile_queries(
    tile, cu_seqlens_q, context_lens, num_rows, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr
):
    """(row, first query, number of queries, position of the first query) of a tile; no queries: nothing to do."""
    if MAPPING == BY_ROW:
        row = tile
    elif MAPPING == BY_TOKEN:
        row = _row_of_token(tile, cu_seqlens_q, num_rows)
    else:
        row = _row_of_tile(tile, cu_seqlens_q, num_rows, BLOCK_Q)
    begin = tl.load(cu_seqlens_q + row).to(tl.int32)
    end = tl.load(cu_seqlens_q + row + 1).to(tl.int32)
    context_len = tl.load(context_lens + row).to(tl.int32)
    if MAPPING == BY_ROW:
        first = begin
        count = tl.where(end - begin <= BLOCK_Q, end - begin, 0)
    elif MAPPING == BY_TOKEN:
        first = tile
        count = tl.where((begin <= tile) & (tile < end), 1, 0)
    else:
        first = begin + (tile - _first_tile(begin, row, BLOCK_Q)) * BLOCK_Q
        count = tl.where(end - begin >= MIN_Q, tl.minimum(end - first, BLOCK_Q), 0)
    return row, first, count, context_len - end + first


@triton.jit
def _row_of_token(token, cu_seqlens_q, num_rows):
    """The row of a query. Where every row has one query it is found without a search."""
    is_its_own = (tl.load(cu_seqlens_q + token) == token) & (tl.load(cu_seqlens_q + token + 1) == token + 1)
    low = tl.where(is_its_own, token, 0)
    high = tl.where(is_its_own, token + 1, num_rows)
    while high - low > 1:  # cu_seqlens_q[low] <= token < cu_seqlens_q[high]
        middle = (low + high) // 2
        is_left = token < tl.load(cu_seqlens_q + middle)
        high = tl.where(is_left, middle, high)
        low = tl.where(is_left, low, middle)
    return low


@triton.jit
def _first_tile(begin, row, BLOCK_Q: tl.constexpr):
    """Number of a row's first tile: a function of the row alone that leaves each row the tiles it needs."""
    return (begin + row * (BLOCK_Q - 1)) // BLOCK_Q


@triton.jit
def _row_of_tile(tile, cu_seqlens_q, num_rows, BLOCK_Q: tl.constexpr):
    low = tile * 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_left = tile < _first_tile(tl.load(cu_seqlens_q + middle).to(tl.int32), middle, BLOCK_Q)
        high = tl.where(is_left, middle, high)
        low = tl.where(is_left, low, middle)
    return low


@triton.jit
def product_rows(
    rows, first, count, head_tile, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """(token, head, is it a query) of the rows of a program's matrix product.

    The rows are queries of one row of the batch, and of each query the heads that share a KV head.
    """
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head = (head_tile % HEAD_TILES) * HEADS + rows % HEADS
    is_query = (rows // HEADS < count) & (rows < HEADS * BLOCK_Q) & (head < GROUP)
    return (first + rows // HEADS).to(tl.int64), head_tile // HEAD_TILES * GROUP + head, is_query


@triton.jit
def visible_tokens(position, count, window, HAS_WINDOW: tl.constexpr):
    """First token that some query of a tile sees, and the one after the last."""
    begin = position * 0
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0)
    return begin, tl.maximum(position + count, 0)


@triton.jit
def split_tiles(begin, end, split, num_splits, TILE: tl.constexpr):
    """First tile of tokens of a split, the one after its last, and how many splits have any.

    Each row is divided among the splits by its own length, in whole tiles.
    """
    first = begin // TILE
    last = tl.maximum(tl.cdiv(end, TILE), first)
    share = tl.maximum(tl.cdiv(last - first, num_splits), 1)
    start = first + split * share
    return start, tl.minimum(start + share, last), tl.cdiv(last - first, share)


@triton.jit
def whole_tiles(position, count, window, start, stop, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Of tiles ``start .. stop - 1`` the range that every query of the program sees wholly."""
    first = start
    if HAS_WINDOW:
        first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(position + count - window, 0), TILE), start), stop)
    return first, tl.maximum(tl.minimum((position + 1) // TILE, stop), first)
