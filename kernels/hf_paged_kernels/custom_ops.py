"""The ops as torch knows them: schemas in ``torch.ops.hf_paged``, and the shapes of results for `torch.compile`.

Beside each op there is ``<name>_torch``, which always runs in torch: C++ kernels call it for what they do not serve.
"""

from collections.abc import Callable

import torch

from hf_paged_kernels import torch_sdpa
from hf_paged_kernels.backends import OPS, python_kernel

_ROWS = "Tensor block_tables, Tensor context_lens, Tensor cu_seqlens_q"
_SCALES = "Tensor? key_scales=None, Tensor? value_scales=None"
_OPTIONS = "float scale, int? window=None, float? softcap=None, Tensor? sinks=None"
_WRITTEN_SCALES = "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None"
_READ = "Tensor key_cache, Tensor value_cache"
_WRITE = "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping"
_SCHEMAS = {
    "write_kv": f"({_WRITE}, {_WRITTEN_SCALES}) -> ()",
    "copy_blocks": "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor source, Tensor destination) -> ()",
    "paged_attention": f"(Tensor query, {_READ}, {_ROWS}, {_OPTIONS}, {_SCALES}) -> Tensor",
    "write_and_attend": f"(Tensor query, {_WRITE}, {_ROWS}, {_OPTIONS}, {_WRITTEN_SCALES}) -> Tensor",
    "latent_attention": "(Tensor query_latent, Tensor query_rope, Tensor latent_cache, Tensor rope_cache, "
    f"{_ROWS}, float scale, int? window=None) -> Tensor",
}
_library = torch.library.Library("hf_paged", "DEF")


def _no_output(*arguments) -> None:
    return None


def _attention_output(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    *arguments,
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    return query.new_empty(*query.shape[:2], value_cache.shape[3])


def _write_and_attend_output(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
    *arguments,
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    return query.new_empty(*query.shape[:2], value.shape[2])


def _latent_attention_output(
    query_latent: torch.Tensor,  # [num_tokens, num_heads, rank]
    *arguments,
) -> torch.Tensor:  # [num_tokens, num_heads, rank]
    return query_latent.new_empty(query_latent.shape)


_FAKES: dict[str, Callable] = {
    "write_kv": _no_output,
    "copy_blocks": _no_output,
    "paged_attention": _attention_output,
    "write_and_attend": _write_and_attend_output,
    "latent_attention": _latent_attention_output,
}


def _define(op: str, name: str, kernel: Callable) -> None:
    _library.define(name + _SCHEMAS[op], tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_paged::{name}", _FAKES[op])


for _op in OPS:
    _define(_op, _op, python_kernel(_op))
    _define(_op, f"{_op}_torch", getattr(torch_sdpa, _op))
