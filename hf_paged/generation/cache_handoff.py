"""Hands the blocks of a row that ran packed over to the cache that the caller goes on with."""

from collections.abc import Sequence

from transformers import DynamicCache

from hf_paged.cache.batch_state import GroupRows
from hf_paged.cache.layers import PagedLayer
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.reasons import Reason, Why
from hf_paged.scheduling.request import Request


def why_not_hand_over(cache: DynamicCache, pool: KVPool) -> Why | None:
    """Why an empty cache of paged layers cannot take over blocks of `pool`; None if it can."""
    layers = _paged_layers(cache)
    batch = layers[0].batch
    if batch.is_bound and batch.pool is not pool:
        return Reason.OTHER_POOL
    windows = {index: spec.window for spec, group in pool.groups.items() for index in group.layers}
    if windows != {index: layer.window for index, layer in enumerate(layers)}:
        return Reason.OTHER_LAYERS
    return Reason.RECORDED_PAST if batch.record_past else None


def hand_over(cache: DynamicCache, request: Request, pool: KVPool, specs: Sequence[KVCacheSpec]) -> None:
    """Let an empty cache of one row hold what `request` has stored, as if its forwards had gone through the cache.

    The cache owns a reference to each block from now on. Called under the pool's lock.

    Parameters
    ----------
    cache : DynamicCache
        Its layers are paged. Changed in place.
    request : Request
        A row without pads; not changed.
    specs : sequence of KVCacheSpec
        The KV cache group of each of the request's tables.
    """
    layers = _paged_layers(cache)
    batch = layers[0].batch
    batch.bind(pool)
    batch.batch_size = 1
    for spec, table in zip(specs, request.tables):
        group = pool.groups[spec]
        batch.groups[spec] = rows = GroupRows(group, 0)
        rows.tables = [table.fork()]
        for index, storage in group.layers.items():
            rows.lengths[index] = request.num_stored
            layers[index].lazy_initialization(storage.new_states(True, 1, 0), storage.new_states(False, 1, 0))
            layers[index].epoch = batch.epoch


def _paged_layers(cache: DynamicCache) -> list[PagedLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    assert len(layers) == len(cache.layers), "a cache with other layers is not eligible"
    return layers
