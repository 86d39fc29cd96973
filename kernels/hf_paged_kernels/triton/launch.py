"""The functions of `ops` on Triton, for tensors on a GPU: they launch kernel calls.

Nothing here waits for the device or reads a tensor, and shapes alone decide what is launched: a captured graph
replays with other lengths, tables and slots. Scratch comes from torch's allocator, which knows streams and graphs.
"""

import functools

import torch

from hf_paged_kernels.triton.kernel_calls import attention_calls, copy_call, latent_calls, write_call
from hf_paged_kernels.triton.launch_plan import describe


def _on_their_device(op):
    """Triton launches on the current device; the tensors may be on another one."""

    @functools.wraps(op)
    def call(*arguments, **options):
        device = arguments[0].device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return op(*arguments, **options)
        with torch.cuda.device(device):
            return op(*arguments, **options)

    return call


@_on_their_device
def write_kv(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    key_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None = None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> None:
    """See `ops.write_kv`. A negative slot is not written: a captured graph may be padded."""
    if len(key):
        write_call(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales).launch()


@_on_their_device
def copy_blocks(
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    source: torch.Tensor,  # [num_copies] int64
    destination: torch.Tensor,  # [num_copies] int64
) -> None:
    """See `ops.copy_blocks`."""
    if len(source):
        copy_call(key_cache, value_cache, source, destination).launch()


@_on_their_device
def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    *rows_and_options,
    **options,
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    """See `ops.paged_attention`."""
    out = query.new_empty(*query.shape[:2], value_cache.shape[3])
    if len(query):
        device = describe(query.device)
        for call in attention_calls(device, out, query, key_cache, value_cache, *rows_and_options, **options):
            call.launch()
    return out


def write_and_attend(query, key, value, key_cache, value_cache, slot_mapping, *attention) -> torch.Tensor:
    """See `ops.write_and_attend`."""
    write_kv(key, value, key_cache, value_cache, slot_mapping, *attention[7:])
    return paged_attention(query, key_cache, value_cache, *attention)


@_on_their_device
def latent_attention(
    query_latent: torch.Tensor,  # [num_tokens, num_heads, rank]
    query_rope: torch.Tensor,  # [num_tokens, num_heads, rope_dim]
    *pages_rows_and_options,
    **options,
) -> torch.Tensor:  # [num_tokens, num_heads, rank]
    """See `ops.latent_attention`."""
    out = query_latent.new_empty(query_latent.shape)
    if len(query_latent):
        device = describe(query_latent.device)
        for call in latent_calls(device, out, query_latent, query_rope, *pages_rows_and_options, **options):
            call.launch()
    return out
