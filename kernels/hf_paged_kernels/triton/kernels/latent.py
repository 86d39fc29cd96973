"""Absorbed attention over latents: one program per tile of queries with their heads, and split of the context.

A latent is the key and the value of every head, so it is loaded once for both products; its rope part adds to the
scores. As in the decode kernel, ids of blocks are loaded one tile ahead.
"""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.finish import store_result
from hf_paged_kernels.triton.device.pages import block_ids, first_slots, load_states, page_offsets
from hf_paged_kernels.triton.device.rows import product_rows, program_work, split_tiles, visible_tokens
from hf_paged_kernels.triton.device.softmax import LOWEST, rescale


@triton.jit(
    do_not_specialize=["num_rows", "table_stride", "window", "num_extra"],
    do_not_specialize_on_alignment=["block_tables", "context_lens", "cu_seqlens_q"],
)
def latent_kernel(
    query_latent, query_rope, latent_cache, rope_cache, block_tables, context_lens, cu_seqlens_q, out,
    partial_out, partial_lse, num_rows, table_stride,
    latent_token_stride, latent_head_stride, rope_token_stride, rope_head_stride, scale, window, num_extra,
    GROUP: tl.constexpr, RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LATENT_STRIDES: tl.constexpr, ROPE_STRIDES: tl.constexpr, RANK_LANES: tl.constexpr, ROPE_LANES: tl.constexpr,
    MAPPING: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, MIN_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    MIN_TILES: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    head_tile = tl.program_id(1)
    row, first, count, position, split, num_splits, slot = program_work(
        tl.program_id(0), num_extra, cu_seqlens_q, context_lens, num_rows, window,
        MAPPING, BLOCK_Q, MIN_Q, TILE, MIN_TILES, MAX_SPLITS, HAS_WINDOW, IS_SPLIT,
    )  # fmt: skip
    begin, end = visible_tokens(position, count, window, HAS_WINDOW)
    start, stop, _ = split_tiles(begin, end, split, num_splits, TILE)
    if (count <= 0) | ((split > 0) & (start >= stop)):
        return

    rows = tl.arange(0, BLOCK_M)
    token, head, is_query = product_rows(rows, first, count, head_tile, GROUP, HEADS, BLOCK_Q)
    last_seen = position + rows // HEADS  # [BLOCK_M]
    lanes, rope_lanes = tl.arange(0, RANK_LANES), tl.arange(0, ROPE_LANES)
    latents_at = query_latent + (token * latent_token_stride + head * latent_head_stride)[:, None] + lanes[None, :]
    ropes_at = query_rope + (token * rope_token_stride + head * rope_head_stride)[:, None] + rope_lanes[None, :]
    queries = load_states(latents_at, is_query, lanes, RANK, RANK_LANES)
    rope_queries = load_states(ropes_at, is_query, rope_lanes, ROPE_DIM, ROPE_LANES)

    tokens = tl.arange(0, TILE)
    slots = first_slots(tokens, BLOCK_SIZE, TILE)[:, None]
    table = block_tables + row.to(tl.int64) * table_stride
    pages_at = latent_cache + (slots * LATENT_STRIDES[2] + lanes[None, :])
    rope_pages_at = rope_cache + (slots * ROPE_STRIDES[2] + rope_lanes[None, :])
    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M, RANK_LANES), tl.float32)
    ids = block_ids(table, tokens + start * TILE, end, BLOCK_SIZE)
    for number in range(0, stop - start):  # From a constant, as in the decode kernel.
        at = tokens + (start + number) * TILE
        is_stored = (at >= begin) & (at < end)
        pages = page_offsets(ids, at, BLOCK_SIZE, LATENT_STRIDES, TILE)[:, None]
        rope_pages = page_offsets(ids, at, BLOCK_SIZE, ROPE_STRIDES, TILE)[:, None]
        latents = load_states(pages_at + pages, is_stored, lanes, RANK, RANK_LANES)
        ropes = load_states(rope_pages_at + rope_pages, is_stored, rope_lanes, ROPE_DIM, ROPE_LANES)
        ids = block_ids(table, at + TILE, end, BLOCK_SIZE)
        scores = tl.dot(queries, tl.trans(latents), input_precision=PRECISION)
        scores = tl.dot(rope_queries, tl.trans(ropes), scores, input_precision=PRECISION)
        is_seen = is_stored[None, :] & (at[None, :] <= last_seen[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (at[None, :] > (last_seen - window)[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        maximum, old, weights = rescale(maximum, scores, scale, 1)
        total = total * old + tl.sum(weights, 1)
        summed = tl.dot(weights.to(latents.dtype), latents, summed * old[:, None], input_precision=PRECISION)

    store_result(
        summed, total, maximum, None, out, partial_out, partial_lse, token, head, GROUP, rows, slot, head_tile,
        is_query, lanes, HEADS * BLOCK_Q, RANK, False, IS_SPLIT,
    )  # fmt: skip
