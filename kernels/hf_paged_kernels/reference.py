"""The oracle: every op of the layer in plain torch, written to be read, right in float64."""

import torch

from hf_paged_kernels.quantized import dequantize, quantize, rotate


def write_kv(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> None:
    """See `ops.write_kv`."""
    pages = [(key_cache, key), (value_cache, value)]
    if key_scales is not None and value_scales is not None:
        keys, values = quantize(rotate(key), key_cache.dtype), quantize(value, value_cache.dtype)
        pages = [(key_cache, keys[0]), (key_scales, keys[1]), (value_cache, values[0]), (value_scales, values[1])]
    block_size = key_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            for cache, states in pages:
                cache[slot // block_size, :, slot % block_size] = states[token]


def copy_blocks(
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    source: torch.Tensor,  # [num_copies] int64
    destination: torch.Tensor,  # [num_copies] int64
) -> None:
    """See `ops.copy_blocks`."""
    for src, dst in zip(source.tolist(), destination.tolist(), strict=True):
        key_cache[dst] = key_cache[src].clone()
        value_cache[dst] = value_cache[src].clone()


def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    """See `ops.paged_attention`."""
    if key_scales is not None and value_scales is not None:
        dtype, query = query.dtype, rotate(query)
        keys, values = (
            dequantize(key_cache, key_scales, query.dtype),
            dequantize(value_cache, value_scales, query.dtype),
        )
        rows = block_tables, context_lens, cu_seqlens_q
        return paged_attention(query, keys, values, *rows, scale, window, softcap, sinks).to(dtype)
    groups = query.shape[1] // key_cache.shape[1]
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    starts = cu_seqlens_q.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        keys = _row_tokens(key_cache, block_tables[row], context_len).repeat_interleave(groups, dim=1)
        values = _row_tokens(value_cache, block_tables[row], context_len).repeat_interleave(groups, dim=1)
        num_queries = starts[row + 1] - starts[row]
        for index in range(num_queries):
            position = context_len - num_queries + index
            first = 0 if window is None else max(0, position - window + 1)
            if position < first:
                continue
            visible = slice(first, position + 1)
            token = starts[row] + index
            scores = torch.einsum("hd,thd->ht", query[token], keys[visible]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(scores.dtype)[:, None]], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : position + 1 - first]
            out[token] = torch.einsum("ht,thd->hd", weights, values[visible])
    return out


def write_and_attend(query, key, value, key_cache, value_cache, slot_mapping, *attention) -> torch.Tensor:
    """See `ops.write_and_attend`."""
    write_kv(key, value, key_cache, value_cache, slot_mapping, *attention[7:])
    return paged_attention(query, key_cache, value_cache, *attention)


def latent_attention(
    query_latent: torch.Tensor,  # [num_tokens, num_heads, rank]
    query_rope: torch.Tensor,  # [num_tokens, num_heads, rope_dim]
    latent_cache: torch.Tensor,  # [num_blocks, 1, block_size, rank]
    rope_cache: torch.Tensor,  # [num_blocks, 1, block_size, rope_dim]
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor,  # [num_rows] int64
    cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
    scale: float,
    window: int | None = None,
) -> torch.Tensor:  # [num_tokens, num_heads, rank]
    """See `ops.latent_attention`."""
    query, keys = torch.cat((query_latent, query_rope), 2), torch.cat((latent_cache, rope_cache), 3)
    return paged_attention(query, keys, latent_cache, block_tables, context_lens, cu_seqlens_q, scale, window)


def _row_tokens(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a row, [length, num_kv_heads, head_dim]."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    blocks = cache[table[: -(-length // block_size)]]  # [blocks, num_kv_heads, block_size, head_dim]
    return blocks.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:length]
