"""Attention of rows with few queries: one program per row, KV head and split of the row's context.

The queries of a group of heads fill the rows of one matrix product, so each key and value is read once.
A tile of tokens is cut into PARTS, one per warp, each with a running softmax of its own: no warp waits for another
inside the loop, and one block id per part gives the addresses of all its tokens. Ids are loaded one tile ahead,
because the pipeliner prefetches a load only if its address is known when an iteration begins.
"""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.codes import SCALES, load_scales, rotated, scaled_values, scaled_weights, widened
from hf_paged_kernels.triton.device.finish import store_result
from hf_paged_kernels.triton.device.pages import block_ids, first_slots, load_states, page_offsets
from hf_paged_kernels.triton.device.rows import product_rows, program_work, split_tiles, visible_tokens
from hf_paged_kernels.triton.device.softmax import LOWEST, capped, rescale


@triton.jit(
    do_not_specialize=["num_rows", "table_stride", "window", "num_extra"],
    do_not_specialize_on_alignment=["block_tables", "context_lens", "cu_seqlens_q", "sinks", *SCALES],
)
def decode_kernel(
    query, key_cache, value_cache, key_scales, value_scales, block_tables, context_lens, cu_seqlens_q, sinks,
    out, partial_out, partial_lse,
    num_rows, table_stride, query_token_stride, query_head_stride, scale, softcap, window, num_extra,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_STRIDES: tl.constexpr, VALUE_STRIDES: tl.constexpr, KEY_LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    KEY_SCALE_STRIDES: tl.constexpr, VALUE_SCALE_STRIDES: tl.constexpr, ROTATION: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    MIN_TILES: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PARTS: tl.constexpr, PART_TOKENS: tl.constexpr, PRECISION: tl.constexpr, RELOAD_QUERIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = PARTS * PART_TOKENS
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
    queries = tl.broadcast_to(queries[None], (PARTS, BLOCK_M, KEY_LANES))

    # Where a block holds whole parts, the id of a part's first token is enough.
    inside = tl.arange(0, PART_TOKENS)[None, :]
    tokens = tl.arange(0, PARTS)[:, None] * PART_TOKENS + inside  # [PARTS, PART_TOKENS]
    if BLOCK_SIZE % PART_TOKENS == 0:
        named = tl.arange(0, PARTS)[:, None] * PART_TOKENS  # [PARTS, 1]
    else:
        named = tokens
        inside = inside * 0
    slots = first_slots(named, BLOCK_SIZE, TILE) + inside  # [PARTS, PART_TOKENS]
    if key_scales is not None:
        key_scales_at = key_scales + kv_head * KEY_SCALE_STRIDES[1] + slots * KEY_SCALE_STRIDES[2]
        value_scales_at = value_scales + kv_head * VALUE_SCALE_STRIDES[1] + slots * VALUE_SCALE_STRIDES[2]
    slots = slots[:, :, None]
    table = block_tables + row.to(tl.int64) * table_stride
    keys_at = key_cache + kv_head * KEY_STRIDES[1] + (slots * KEY_STRIDES[2] + key_lanes)
    values_at = value_cache + kv_head * VALUE_STRIDES[1] + (slots * VALUE_STRIDES[2] + value_lanes)

    maximum = tl.full((PARTS, BLOCK_M), LOWEST, tl.float32)
    total = tl.zeros((PARTS, BLOCK_M), tl.float32)
    summed = tl.zeros((PARTS, BLOCK_M, VALUE_LANES), tl.float32)
    ids = block_ids(table, named + start * TILE, end, BLOCK_SIZE)
    for number in range(0, stop - start):  # From a constant: else the compiler may lose track of what is aligned.
        passed = (start + number) * TILE
        at = named + passed
        is_stored = tokens < end - passed
        if HAS_WINDOW:
            is_stored = is_stored & (tokens >= begin - passed)
        key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_STRIDES, TILE)[:, :, None]
        value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_STRIDES, TILE)[:, :, None]
        keys = load_states(keys_at + key_pages, is_stored, key_lanes, KEY_DIM, KEY_LANES)
        values = load_states(values_at + value_pages, is_stored, value_lanes, VALUE_DIM, VALUE_LANES)
        if key_scales is not None:
            keys, values = widened(keys, queries.dtype), widened(values, queries.dtype)
            key_pages = page_offsets(ids, at, BLOCK_SIZE, KEY_SCALE_STRIDES, TILE)
            value_pages = page_offsets(ids, at, BLOCK_SIZE, VALUE_SCALE_STRIDES, TILE)
            of_keys = load_scales(key_scales_at, key_pages, is_stored)  # [PARTS, PART_TOKENS]
            of_values = load_scales(value_scales_at, value_pages, is_stored)
            values = scaled_values(values, of_values)
        ids = block_ids(table, at + TILE, end, BLOCK_SIZE)
        if RELOAD_QUERIES:
            queries = tl.load(queries_at, mask=is_query[:, None] & (key_lanes < KEY_DIM), other=0.0, volatile=True)
            queries = tl.broadcast_to(queries[None], (PARTS, BLOCK_M, KEY_LANES))
        scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)), input_precision=PRECISION)
        if key_scales is not None:
            scores *= of_keys[:, None, :]
        scores, factor = capped(scores, scale, softcap, HAS_SOFTCAP)
        is_seen = is_stored[:, None, :]
        if BLOCK_Q > 1:
            is_seen = tokens[:, None, :] <= (last_seen - passed)[None, :, None]
            if HAS_WINDOW:
                is_seen = is_seen & (tokens[:, None, :] > (last_seen - passed - window)[None, :, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        maximum, old, weights = rescale(maximum, scores, factor, 2)
        total = total * old + tl.sum(weights, 2)
        if key_scales is not None:
            weights = scaled_weights(weights, of_values, values.dtype)
        summed = tl.dot(weights.to(values.dtype), values, summed * old[:, :, None], input_precision=PRECISION)

    if key_scales is not None:
        # As in the prefill kernel: codes need the registers in which this would wait.
        rows += tl.load(cu_seqlens_q, volatile=True).to(tl.int32)
        token, head, is_query = product_rows(rows, first, count, head_tile, GROUP, HEADS, BLOCK_Q)
    # The parts' softmaxes become one.
    largest = tl.max(maximum, 0)
    share = tl.exp2(maximum - largest[None, :])
    total = tl.sum(total * share, 0)
    result = tl.sum(summed * share[:, :, None], 0)  # [BLOCK_M, VALUE_LANES]
    store_result(
        result, total, largest, sinks, out, partial_out, partial_lse,
        token, head, tl.num_programs(1) // HEAD_TILES * GROUP, rows, slot, head_tile,
        is_query, value_lanes, HEADS * BLOCK_Q, VALUE_DIM, HAS_SINKS, IS_SPLIT,
    )  # fmt: skip
