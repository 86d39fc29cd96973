"""Rectangular calls: beams, assisted decoding and what falls back, with their blocks reserved at entry."""

import torch

from hf_paged.cache.duplicate_rows import first_equal_rows
from hf_paged.cache.layers import PagedLayer
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.memory.reservation import reserve
from hf_paged.memory.sizing import row_blocks
from hf_paged.models import registry


def run_upstream_loop(original, model, input_ids, *args, **kwargs):
    """Run transformers' own loop `original` of a paged model; other calls keep off the blocks that it will need."""
    pools = registry.pools_under(model)
    needs = {}
    if len(pools) == 1:
        config = kwargs["generation_config"] if "generation_config" in kwargs else args[2]
        needs = _needs(pools[0], input_ids, kwargs.get("attention_mask"), config.max_length or 0, _cache_of(kwargs))
    if not needs:  # The first call of all sizes the pool: nobody runs beside it.
        return original(model, input_ids, *args, **kwargs)
    with reserve(pools[0], needs):
        return original(model, input_ids, *args, **kwargs)


def _cache_of(kwargs: dict):
    cache = kwargs.get("past_key_values")
    return getattr(cache, "self_attention_cache", cache)


def _needs(pool, ids: torch.Tensor, mask: torch.Tensor | None, max_length: int, cache) -> dict[KVCacheGroup, int]:
    """Blocks that a call's rows hold at most, by attention group, besides those that its cache has already."""
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PagedLayer)]
    if not layers or layers[0].is_dense:
        return {}
    held = layers[0].batch.groups
    has_mask = mask is not None and mask.dim() == 2 and len(mask) == len(ids)
    valid = mask.bool() if has_mask else torch.ones_like(ids, dtype=torch.bool)
    prompts, new = valid.sum(1).tolist(), max(0, max_length - ids.shape[1])
    duplicate_of = first_equal_rows(ids, valid) if ids.shape == valid.shape else None
    needs = {}
    for key, group in pool.groups.items():
        if any(layer.window == key.window for layer in layers):
            size, window = group.blocks.block_size, key.window
            count = sum(row_blocks(prompt + new, size, window) for prompt in prompts)
            if window is None and duplicate_of is not None:  # Full blocks of a prompt are stored once for equal rows.
                count -= sum(prompt // size for row, prompt in enumerate(prompts) if duplicate_of[row] != row)
            if key in held:
                count -= sum(len(table.blocks) for table in held[key].tables)
            needs[group] = max(0, count)
    return needs
