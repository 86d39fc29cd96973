"""The op layer: what every kernel computes, on whatever backend. Imports nothing of hf_paged.

Blocks are named by id. A slot is ``block * block_size + offset``. The ops own nothing: the caller owns
the blocks and guarantees that those written belong to one row only.

A step may be padded to a fixed shape, as a captured graph needs it. A padding row has one query, a context of 0
tokens and any valid ids in its block table; the slot of its token is -1. Nothing of it is stored, and its result is
zero.

Pages hold states in the dtype of the query, or quantised: caches of int8 or float8_e4m3fn with a scale for each token
and head, as `quantized` says. What new tokens are stored as is then up to rounding: a code may differ by one between
backends.

Each function is a custom op of its name in ``torch.ops.hf_paged``, and `backends` says what serves a call of it.
"""

import torch

from hf_paged_kernels import backends, torch_sdpa
from hf_paged_kernels.backends import Backend
from hf_paged_kernels.cpu import loader
from hf_paged_kernels.triton import dispatch

for _backend in (
    Backend("cpp", "cpu", loader.find, priority=10, state=loader.state),
    Backend("triton", "cuda", dispatch.find, priority=10, state=dispatch.state),
    Backend("torch", None, torch_sdpa.find, priority=0),
):
    backends.register(_backend)
_write_kv = torch.ops.hf_paged.write_kv.default
_copy_blocks = torch.ops.hf_paged.copy_blocks.default
_paged_attention = torch.ops.hf_paged.paged_attention.default
_write_and_attend = torch.ops.hf_paged.write_and_attend.default
_latent_attention = torch.ops.hf_paged.latent_attention.default


def write_kv(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> None:
    """Store new tokens in their slots. Mutates the caches and their scales, nothing else.

    A token whose slot is -1 is not stored.
    """
    _write_kv(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales)


def copy_blocks(
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    source: torch.Tensor,  # [num_copies] int64
    destination: torch.Tensor,  # [num_copies] int64
) -> None:
    """Copy whole blocks (copy-on-write). Mutates both caches; sources and destinations are disjoint."""
    _copy_blocks(key_cache, value_cache, source, destination)


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
    """Causal attention of packed queries over the pages of their rows.

    Row ``r`` has the queries ``cu_seqlens_q[r] .. cu_seqlens_q[r + 1] - 1``; they are the last tokens of
    its context, whose keys and values are in the pages already. A query sees the tokens up to itself.

    Parameters
    ----------
    query : torch.Tensor
        Packed query tokens; any strides.
    key_cache, value_cache : torch.Tensor
        The pages; key and value head sizes may differ. ``num_heads`` is a multiple of ``num_kv_heads``.
    block_tables : torch.Tensor
        Blocks of each row in token order; rows may lie apart. Entries past a row's context are any valid ids.
    context_lens : torch.Tensor
        Tokens of each row, its queries included; 0 gives zeros.
    cu_seqlens_q : torch.Tensor
        Running count of queries.
    scale : float
        Factor on the scores.
    window : int, optional
        A query sees its last `window` tokens only, itself included.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    sinks : torch.Tensor, optional
        A score per head that takes part in the softmax and has no value.
    key_scales, value_scales : torch.Tensor, optional
        Of quantised pages, both or neither.

    Returns
    -------
    torch.Tensor
        In the dtype of `query`. Slots that hold no token of the row never matter, even if they are NaN.
    """
    return _paged_attention(
        query, key_cache, value_cache, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
        key_scales, value_scales,
    )  # fmt: skip


def write_and_attend(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
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
    """`write_kv`, then `paged_attention`, as one op. Mutates the caches and their scales, nothing else.

    `slot_mapping` need not be as long as `query`: rows that share blocks store their tokens once.
    """
    return _write_and_attend(
        query, key, value, key_cache, value_cache, slot_mapping,
        block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks, key_scales, value_scales,
    )  # fmt: skip


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
    """Absorbed attention over latents (MLA): `paged_attention` whose keys and values are one latent for all heads.

    A score is ``query_latent . latent + query_rope . rope``, and a result the weighted sum of latents. The caller
    turns queries into `query_latent` by the part of the expansion that makes keys, and results by the part that makes
    values (DeepSeek-V2, arXiv:2405.04434). `write_kv` stores latents as keys and rope parts as values.

    Parameters
    ----------
    query_latent, query_rope : torch.Tensor
        Packed query tokens; any strides.
    latent_cache, rope_cache : torch.Tensor
        The pages: one latent and one rope part for each token.
    block_tables, context_lens, cu_seqlens_q, scale, window
        As in `paged_attention`.

    Returns
    -------
    torch.Tensor
        In the dtype of `query_latent`. Slots that hold no token of the row never matter, even if they are NaN.
    """
    return _latent_attention(
        query_latent, query_rope, latent_cache, rope_cache, block_tables, context_lens, cu_seqlens_q, scale, window
    )
