"""Transformers' own decoding loops over the pages: beams, assisted decoding and calls that are not packed.

Their rows hold their blocks to the end, so these are reserved before the loop begins.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from hf_paged import exit_report
from hf_paged.cache.duplicate_rows import first_equal_rows
from hf_paged.cache.layers import PagedLayer
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.memory.kv_pool import KVCacheGroup, KVPool
from hf_paged.memory.reservation import reserve
from hf_paged.memory.sizing import row_blocks
from hf_paged.models import registry
from hf_paged.models.placement import devices_of


def at_home(loop: Callable) -> Callable:
    """Let a decoding loop ``(original, model, input_ids, ...)`` run on the home streams of its model's devices."""

    @functools.wraps(loop)
    def run(original: Callable, model: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with on_home_stream(*devices_of(model, input_ids.device)) as lend:
            return lend(loop(original, model, input_ids, *args, **kwargs))

    return run


@at_home
def run_upstream_loop(
    original: Callable, model: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run transformers' own loop `original` of a paged model; other calls keep off the blocks that it will need."""
    pools = registry.pools_under(model)
    needs = {}
    if len(pools) == 1:
        config = kwargs["generation_config"] if "generation_config" in kwargs else args[2]
        needs = _needs(pools[0], input_ids, kwargs.get("attention_mask"), config.max_length or 0, _cache_of(kwargs))
    if not needs:  # The first call of all sizes the pool: no other call runs beside it.
        output = original(model, input_ids, *args, **kwargs)
    else:
        with reserve(pools[0], needs):
            output = original(model, input_ids, *args, **kwargs)
    exit_report.note(model)
    return output


def _cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """The cache of the decoder's own tokens."""
    cache = kwargs.get(CACHE_ARGUMENT)
    return getattr(cache, "self_attention_cache", cache)


def _needs(
    pool: KVPool, ids: torch.Tensor, mask: torch.Tensor | None, max_length: int, cache: Cache | None
) -> dict[KVCacheGroup, int]:
    """Blocks that a call's rows hold at most, by KV cache group, besides those that its cache has already."""
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PagedLayer)]
    if not layers or layers[0].is_dense:
        return {}
    held = layers[0].batch.groups
    if mask is not None and mask.dim() == 2 and len(mask) == len(ids):
        valid = mask.bool()
    else:
        valid = torch.ones_like(ids, dtype=torch.bool)
    prompts, new = valid.sum(1).tolist(), max(0, max_length - ids.shape[1])
    duplicate_of = first_equal_rows(ids, valid) if ids.shape == valid.shape else None
    needs = {}
    for spec, group in pool.groups.items():
        if any(layer.window == spec.window for layer in layers):
            size, window = group.blocks.block_size, spec.window
            count = sum(row_blocks(prompt + new, size, window) for prompt in prompts)
            if window is None and duplicate_of is not None:  # Full blocks of a prompt are stored once for equal rows.
                count -= sum(prompt // size for row, prompt in enumerate(prompts) if duplicate_of[row] != row)
            if spec in held:
                count -= sum(len(table.blocks) for table in held[spec].tables)
            needs[group] = max(0, count)
    return needs
