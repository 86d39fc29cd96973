"""Attention kernels of others over the keys and values of our pages, each behind one function without arguments.

A function that makes a call raises what the peer raises: ModuleNotFoundError where it is absent, and errors of any kind
where it refuses.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_paged_evals.gpu.pages import OpArguments, OpCase

TOLERANCE = 0.05  # Between outputs in bfloat16 of states that are normally distributed.
_WORKSPACE = 256 << 20  # Bytes that FlashInfer's documentation has its callers allocate: twice its 128 MiB.

Call = Callable[[], torch.Tensor]


def dense(given: OpArguments, case: OpCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of rows of one length, each ``[rows, num_kv_heads, context, dim]``, contiguous."""
    rows, length, heads = len(case.rows), case.rows[0][0], case.heads
    found = []
    for cache in (given.key_cache, given.value_cache):
        blocks = cache[given.block_tables].transpose(1, 2)  # [rows, num_kv_heads, blocks, block_size, dim]
        found.append(blocks.reshape(rows, heads.num_kv_heads, -1, heads.dim)[:, :, :length].contiguous())
    return found[0], found[1]


def sdpa_decode(backend: SDPBackend, given: OpArguments, case: OpCase) -> Call:
    """One backend of torch's `scaled_dot_product_attention`, dense, with grouped heads."""
    key, value = dense(given, case)
    query = given.query[:, :, None]  # [rows, num_heads, 1, dim]

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return call


def sdpa_prefill(backend: SDPBackend, given: OpArguments, case: OpCase) -> Call:
    """The same for whole prompts, causal."""
    key, value = dense(given, case)
    rows, queries = len(case.rows), case.rows[0][1]
    query = given.query.view(rows, queries, case.heads.num_heads, -1).transpose(1, 2)

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)  # [rows, queries, num_heads, dim]

    return call


def xformers_decode(page_size: int, given: OpArguments, case: OpCase) -> Call:
    """xformers' split-K in Triton over pages of its own size: it takes multiples of 64 tokens."""
    from xformers.ops import fmha

    heads, rows, length = case.heads, len(case.rows), case.rows[0][0]
    if length % page_size:
        raise ValueError(f"a context of {length} tokens is no multiple of {page_size}, its page")
    group = heads.num_heads // heads.num_kv_heads
    # [1, tokens of all pages, num_kv_heads, group, dim]: the heads of a group share their keys.
    key, value = (
        states.transpose(1, 2).reshape(1, rows * length, heads.num_kv_heads, 1, heads.dim).expand(-1, -1, -1, group, -1)
        for states in dense(given, case)
    )
    tables = torch.arange(rows * length // page_size, dtype=torch.int32, device=key.device).view(rows, -1)
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * rows, kv_seqlen=[length] * rows, block_tables=tables, page_size=page_size
    )
    query = given.query.view(1, rows, heads.num_kv_heads, group, heads.dim)
    return lambda: fmha.memory_efficient_attention_forward(query, key, value, bias, op=fmha.triton_splitk.FwOp)


def flashinfer_decode(given: OpArguments, case: OpCase) -> Call:
    """FlashInfer's paged decode over our own pages and tables."""
    import flashinfer

    heads, rows = case.heads, len(case.rows)
    width = given.block_tables.shape[1]
    numbers = functools.partial(torch.tensor, dtype=torch.int32, device=given.query.device)
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=given.query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    last = case.rows[0][0] - (width - 1) * case.block_size
    wrapper.plan(
        numbers([row * width for row in range(rows + 1)]), given.block_tables.int().flatten(), numbers([last] * rows),
        heads.num_heads, heads.num_kv_heads, heads.dim, case.block_size,
        q_data_type=case.dtype, kv_data_type=case.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(given.query, (given.key_cache, given.value_cache))


_SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Make = Callable[[OpArguments, OpCase], Call]
# In the order in which they run: the last compiles at its first use, for minutes where it finds nothing compiled.
DECODE: dict[str, Make] = {
    **{name: functools.partial(sdpa_decode, backend) for name, backend in _SDPA.items()},
    "xformers split-K, pages of 64": functools.partial(xformers_decode, 64),
    "xformers split-K, pages of 256": functools.partial(xformers_decode, 256),
    "flashinfer": flashinfer_decode,
}
PREFILL: dict[str, Make] = {name: functools.partial(sdpa_prefill, backend) for name, backend in _SDPA.items()}
