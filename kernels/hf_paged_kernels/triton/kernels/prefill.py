"""Attention of rows with many queries: one program per tile of queries, KV head and split of the context.

The rows of a tile's matrix product are BLOCK_Q queries times the heads of a group, so each key and value is read
once per tile. Tiles of tokens that all queries see wholly need no mask; the others, at the diagonal and at the edge
of a window, come last.
"""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.codes import SCALES, load_scales, rotated, scaled_values, scaled_weights, widened
from hf_paged_kernels.triton.device.finish import store_result
from hf_paged_kernels.triton.device.pages import block_ids, first_slots, load_states, page_offsets
from hf_paged_kernels.triton.device.rows import product_rows, program_work, split_tiles, visible_tokens, whole_tiles
from hf_paged_kernels.triton.device.softmax import LOWEST, capped, rescale


@triton.jit(
    do_not_specialize=["num_rows", "table_stride", "window", "num_extra"],
    do_not_specialize_on_alignment=["block_tables", "context_lens", "cu_seqlens_q", "sinks", *SCALES],
)
def prefill_kernel(
    query, key_cache, value_cache, key_scales, value_scales, block_tables, context_lens, cu_seqlens_q, sinks,
    out, partial_out, partial_lse,
    num_rows, table_stride, query_token_stride, query_head_stride, scale, softcap, window, num_extra,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_STRIDES: tl.constexpr, VALUE_STRIDES: tl.constexpr, KEY_LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    KEY_SCALE_STRIDES: tl.constexpr, VALUE_SCALE_STRIDES: tl.constexpr, ROTATION: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    MIN_TILES: tl.constexpr, MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, RELOAD_QUERIES: tl.constexpr, FIND_ROWS_AGAIN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head_tile = tl.program_id(1)
    row, first, count, position, split, num_splits, slot = program_work(
        tl.program_id(0), num_extra, cu_seqlens_q, context_lens, num_rows, window,
        MAPPING, BLOCK_Q, MIN_Q, TILE, MIN_TILES, MAX_SPLITS, HAS_WINDOW, IS_SPLIT,
    )  # fmt: skip
    begin, end = visible_tokens(position, count, window, HAS_WINDOW)
    start, stop, _ = split_tiles(begin, end, split, num_splits, TILE)
    if (count <= 0) | ((split > 0) & (start >= stop)):
        return

    kv_head = head_tile // HEAD_TILES
    rows = tl.arange(0, BLOCK_M)
    token, head, is_query = product_rows(rows, first, count, head_tile, GROUP, HEADS, BLOCK_Q)
    last_seen = position + rows // HEADS  # [BLOCK_M]
    key_lanes, value_lanes = tl.arange(0, KEY_LANES), tl.arange(0, VALUE_LANES)
    queries_at = query + (token * query_token_stride + head * query_head_stride)[:, None] + key_lanes[None, :]
    queries = load_states(queries_at, is_query, key_lanes, KEY_DIM, KEY_LANES)
    if ROTATION > 1:
        queries = rotated(queries, ROTATION, PRECISION).to(queries.dtype)

    tokens = tl.arange(0, TILE)
    all_stored = tokens >= 0
    slots = first_slots(tokens, BLOCK_SIZE, TILE)
    if key_scales is not None:
        key_scales_at = key_scales + kv_head * KEY_SCALE_STRIDES[1] + slots * KEY_SCALE_STRIDES[2]
        value_scales_at = value_scales + kv_head * VALUE_SCALE_STRIDES[1] + slots * VALUE_SCALE_STRIDES[2]
    slots = slots[:, None]
    table = block_tables + row.to(tl.int64) * table_stride
    keys_at = key_cache + kv_head * KEY_STRIDES[1] + (slots * KEY_STRIDES[2] + key_lanes[None, :])
    values_at = value_cache + kv_head * VALUE_STRIDES[1] + (slots * VALUE_STRIDES[2] + value_lanes[None, :])
    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M, VALUE_LANES), tl.float32)
    whole, whole_end = whole_tiles(position, count, window, start, stop, TILE, HAS_WINDOW)
    ids = block_ids(table, tokens + whole * TILE, end, BLOCK_SIZE)
    for number in range(0, whole_end - whole):  # From a constant, as in the decode kernel.
        index = whole + number
        at = tokens + index * TILE
        key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_STRIDES, TILE)[:, None]
        value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_STRIDES, TILE)[:, None]
        keys = load_states(keys_at + key_pages, all_stored, key_lanes, KEY_DIM, KEY_LANES)
        values = load_states(values_at + value_pages, all_stored, value_lanes, VALUE_DIM, VALUE_LANES)
        if key_scales is not None:
            keys, values = widened(keys, queries.dtype), widened(values, queries.dtype)
            key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_SCALE_STRIDES, TILE)
            value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_SCALE_STRIDES, TILE)
            of_keys = load_scales(key_scales_at, key_pages, all_stored)  # [TILE]
            of_values = load_scales(value_scales_at, value_pages, all_stored)
            values = scaled_values(values, of_values)
        # Of the next tile, as in the decode kernel; after the last one, of the last again.
        ids = block_ids(table, tokens + tl.minimum(index + 1, whole_end - 1) * TILE, None, BLOCK_SIZE)
        if RELOAD_QUERIES:
            queries = tl.load(queries_at, mask=is_query[:, None] & (key_lanes < KEY_DIM), other=0.0, volatile=True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if key_scales is not None:
            scores *= of_keys[None, :]
        scores, factor = capped(scores, scale, softcap, HAS_SOFTCAP)
        maximum, old, weights = rescale(maximum, scores, factor, 1)
        total = total * old + tl.sum(weights, 1)
        if key_scales is not None:
            weights = scaled_weights(weights, of_values, values.dtype)
        summed = tl.dot(weights.to(values.dtype), values, summed * old[:, None], input_precision=PRECISION)

    for number in tl.range(0, whole - start + stop - whole_end, num_stages=1):
        index = tl.where(number < whole - start, start, whole_end - whole + start) + number
        at = tokens + index * TILE
        is_stored = (at >= begin) & (at < end)
        ids = block_ids(table, at, end, BLOCK_SIZE)
        key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_STRIDES, TILE)[:, None]
        value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_STRIDES, TILE)[:, None]
        keys = load_states(keys_at + key_pages, is_stored, key_lanes, KEY_DIM, KEY_LANES)
        values = load_states(values_at + value_pages, is_stored, value_lanes, VALUE_DIM, VALUE_LANES)
        if key_scales is not None:
            keys, values = widened(keys, queries.dtype), widened(values, queries.dtype)
            key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_SCALE_STRIDES, TILE)
            value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_SCALE_STRIDES, TILE)
            of_keys = load_scales(key_scales_at, key_pages, is_stored)  # [TILE]
            of_values = load_scales(value_scales_at, value_pages, is_stored)
            values = scaled_values(values, of_values)
        if RELOAD_QUERIES:
            queries = tl.load(queries_at, mask=is_query[:, None] & (key_lanes < KEY_DIM), other=0.0, volatile=True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if key_scales is not None:
            scores *= of_keys[None, :]
        scores, factor = capped(scores, scale, softcap, HAS_SOFTCAP)
        is_seen = at[None, :] <= last_seen[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (at[None, :] > (last_seen - window)[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        maximum, old, weights = rescale(maximum, scores, factor, 1)
        total = total * old + tl.sum(weights, 1)
        if key_scales is not None:
            weights = scaled_weights(weights, of_values, values.dtype)
        summed = tl.dot(weights.to(values.dtype), values, summed * old[:, None], input_precision=PRECISION)

    if FIND_ROWS_AGAIN:
        # From the first row's start, a zero that the compiler cannot know: else what says where results go would wait
        # in registers through both loops.
        rows += tl.load(cu_seqlens_q, volatile=True).to(tl.int32)
        token, head, is_query = product_rows(rows, first, count, head_tile, GROUP, HEADS, BLOCK_Q)
    store_result(
        summed, total, maximum, sinks, out, partial_out, partial_lse,
        token, head, tl.num_programs(1) // HEAD_TILES * GROUP, rows, slot, head_tile,
        is_query, value_lanes, HEADS * BLOCK_Q, VALUE_DIM, HAS_SINKS, IS_SPLIT,
    )  # fmt: skip
