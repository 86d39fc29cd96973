"""The queries that a program serves, and the tokens of their row that it reads: device code of all kernels.

Lengths are read on the device, so a captured graph may be replayed with other ones; the host knows shapes alone.

A long context is cut into splits. The first split of a tile of queries belongs to the program of that tile; the others
are dealt out to `num_extra` programs, which come first in the grid, since theirs are the longest. How many splits a row
has follows from the lengths of all rows: the longer its context is beside the others, the more of them.
"""

import triton
import triton.language as tl

BY_TOKEN = tl.constexpr(0)  # A tile is one query, of whatever row.
BY_ROW = tl.constexpr(1)  # A tile is a row of few queries; rows of more are left to another kernel.
BY_TILE = tl.constexpr(2)  # A tile is up to BLOCK_Q queries of a row; rows of few are left to another kernel.
_ROWS_AT_ONCE = tl.constexpr(256)


@triton.jit
def program_work(
    program, num_extra, cu_seqlens_q, context_lens, num_rows, window,
    MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, TILE: tl.constexpr, MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """The work of one program of the attention kernels.

    Returns
    -------
    row, first, count, position
        Row of the batch, its first query here, how many (0: nothing to do), and the position of the first.
    split, num_splits
        Which split of the context, and of how many.
    slot
        Where the split leaves its share: extra programs by their number, then first splits; -1 for the only one.
    """
    split, num_splits, slot = program * 0, program * 0 + 1, program * 0 - 1
    if IS_SPLIT:
        tiles = tiles_per_split(
            num_extra, cu_seqlens_q, context_lens, num_rows, window,
            MAPPING, BLOCK_Q, MIN_Q, TILE, MIN_TILES, HAS_WINDOW,
        )  # fmt: skip
        if program < num_extra:
            row, index, split, num_splits = extra_split(
                program, tiles, cu_seqlens_q, context_lens, num_rows, window,
                MAPPING, BLOCK_Q, MIN_Q, TILE, MAX_SPLITS, HAS_WINDOW,
            )  # fmt: skip
            slot = program
        else:
            row, index = tile_place(program - num_extra, cu_seqlens_q, num_rows, MAPPING, BLOCK_Q)
            _, longest = _row_work(
                row, row < num_rows, cu_seqlens_q, context_lens, window, MAPPING, BLOCK_Q, MIN_Q, TILE, HAS_WINDOW
            )
            num_splits = splits_of(longest, tiles, MAX_SPLITS)
            if num_splits > 1:
                before = _extras_before(
                    row, tiles, cu_seqlens_q, context_lens, window,
                    MAPPING, BLOCK_Q, MIN_Q, TILE, MAX_SPLITS, HAS_WINDOW,
                )  # fmt: skip
                slot = num_extra + before + index * (num_splits - 1)
    else:
        row, index = tile_place(program, cu_seqlens_q, num_rows, MAPPING, BLOCK_Q)
    first, count, position = tile_queries(row, index, cu_seqlens_q, context_lens, num_rows, MAPPING, BLOCK_Q, MIN_Q)
    return row, first, count, position, split, num_splits, slot


@triton.jit
def tiles_per_split(
    num_extra, cu_seqlens_q, context_lens, num_rows, window, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr,
    MIN_Q: tl.constexpr, TILE: tl.constexpr, MIN_TILES: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens in a split: as few as leave `num_extra` splits at most beyond the first of each tile of queries.

    A context of n tiles in splits of s has ``(n - 1) // s`` beyond its first. Their sum is a whole number, and at
    most ``sum(n - 1) / s``, which stays below ``num_extra + 1``.
    """
    lanes = tl.arange(0, _ROWS_AT_ONCE)
    beyond = tl.zeros((_ROWS_AT_ONCE,), tl.int32)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = start + lanes
        queries, longest = _row_work(
            rows, rows < num_rows, cu_seqlens_q, context_lens, window, MAPPING, BLOCK_Q, MIN_Q, TILE, HAS_WINDOW
        )
        beyond += queries * tl.maximum(longest - 1, 0)
    return tl.maximum(tl.sum(beyond, 0) // (num_extra + 1) + 1, MIN_TILES)


@triton.jit
def splits_of(longest, tiles, MAX_SPLITS: tl.constexpr):
    """Splits of contexts of `longest` tiles, if `tiles` make one."""
    return tl.minimum(tl.maximum(tl.cdiv(longest, tiles), 1), MAX_SPLITS)


@triton.jit
def extra_split(
    number, tiles, cu_seqlens_q, context_lens, num_rows, window, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr,
    MIN_Q: tl.constexpr, TILE: tl.constexpr, MAX_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(row, tile of its queries, split, number of splits) of a split beyond a first; row `num_rows` or more: none.

    The splits of a tile of queries stand side by side, after those of all tiles before it.
    """
    lanes = tl.arange(0, _ROWS_AT_ONCE)
    row, before, passed = number * 0, number * 0, number * 0
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = start + lanes
        queries, longest = _row_work(
            rows, rows < num_rows, cu_seqlens_q, context_lens, window, MAPPING, BLOCK_Q, MIN_Q, TILE, HAS_WINDOW
        )
        extras = queries * (splits_of(longest, tiles, MAX_SPLITS) - 1)
        until = passed + tl.cumsum(extras, 0)
        is_before = until <= number
        row += tl.sum(is_before.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(is_before, until, 0), 0))
        passed += tl.sum(extras, 0)
    _, longest = _row_work(
        row, row < num_rows, cu_seqlens_q, context_lens, window, MAPPING, BLOCK_Q, MIN_Q, TILE, HAS_WINDOW
    )
    num_splits = splits_of(longest, tiles, MAX_SPLITS)
    extras = tl.maximum(num_splits - 1, 1)
    return row, (number - before) // extras, 1 + (number - before) % extras, num_splits


@triton.jit
def _extras_before(
    row, tiles, cu_seqlens_q, context_lens, window, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr,
    MIN_Q: tl.constexpr, TILE: tl.constexpr, MAX_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Splits beyond the first of all rows before one."""
    lanes = tl.arange(0, _ROWS_AT_ONCE)
    before = tl.zeros((_ROWS_AT_ONCE,), tl.int32)
    for start in range(0, row, _ROWS_AT_ONCE):
        rows = start + lanes
        queries, longest = _row_work(
            rows, rows < row, cu_seqlens_q, context_lens, window, MAPPING, BLOCK_Q, MIN_Q, TILE, HAS_WINDOW
        )
        before += queries * (splits_of(longest, tiles, MAX_SPLITS) - 1)
    return tl.sum(before, 0)


@triton.jit
def _row_work(
    rows, is_row, cu_seqlens_q, context_lens, window,
    MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(tiles of queries, tiles of tokens that one of them reads at most) of rows; nothing where there is no row."""
    count = tl.load(cu_seqlens_q + rows + 1, mask=is_row, other=0) - tl.load(cu_seqlens_q + rows, mask=is_row, other=0)
    count = count.to(tl.int32)
    context_len = tl.load(context_lens + rows, mask=is_row, other=0).to(tl.int32)
    if MAPPING == BY_ROW:
        queries = tl.where((count > 0) & (count <= BLOCK_Q), 1, 0)
    elif MAPPING == BY_TOKEN:
        queries = count
    else:
        queries = tl.where(count >= MIN_Q, tl.cdiv(count, BLOCK_Q), 0)
    longest = tl.cdiv(context_len, TILE)
    if HAS_WINDOW:
        longest = tl.minimum(longest, tl.cdiv(window + BLOCK_Q - 1, TILE) + 1)
    return queries, longest


@triton.jit
def tile_place(tile, cu_seqlens_q, num_rows, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The row of a tile of queries, and which of the row's tiles it is; there may be no such one."""
    if MAPPING == BY_ROW:
        return tile, tile * 0
    if MAPPING == BY_TOKEN:
        row = _row_of_token(tile, cu_seqlens_q, num_rows)
        return row, tile - tl.load(cu_seqlens_q + row).to(tl.int32)
    row = _row_of_tile(tile, cu_seqlens_q, num_rows, BLOCK_Q)
    return row, tile - _first_tile(tl.load(cu_seqlens_q + row).to(tl.int32), row, BLOCK_Q)


@triton.jit
def tile_queries(
    row, index, cu_seqlens_q, context_lens, num_rows, MAPPING: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr
):
    """(first query, number of queries, position of the first) of a tile of a row; no queries: nothing to do."""
    is_row = row < num_rows
    begin = tl.load(cu_seqlens_q + row, mask=is_row, other=0).to(tl.int32)
    end = tl.load(cu_seqlens_q + row + 1, mask=is_row, other=0).to(tl.int32)
    context_len = tl.load(context_lens + row, mask=is_row, other=0).to(tl.int32)
    if MAPPING == BY_ROW:
        first = begin
        count = tl.where(end - begin <= BLOCK_Q, end - begin, 0)
    elif MAPPING == BY_TOKEN:
        first = begin + index
        count = tl.where((index >= 0) & (first < end), 1, 0)
    else:
        first = begin + index * BLOCK_Q
        count = tl.where(end - begin >= MIN_Q, tl.minimum(end - first, BLOCK_Q), 0)
    return first, count, context_len - end + first


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
    """First tile of tokens of a split, the one after its last, and how many splits have any."""
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
