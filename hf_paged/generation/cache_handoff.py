"""A row that ran packed leaves its blocks to the cache that the caller goes on with."""

from collections.abc import Sequence

from transformers import DynamicCache

from hf_paged.cache.batch_state import GroupRows
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.reasons import Reason, Why
from hf_paged.scheduling.request import Request


def why_not_hand_over(cache: DynamicCache, pool: KVPool) -> Why | None:
    """Why an empty cache cannot take over what is stored in `pool`; None if it can."""
    batch = cache.layers[0].batch
    if batch.is_bound and batch.pool is not pool:
        return Reason.OTHER_POOL
    windows = {index: key.window for key, group in pool.groups.items() for index in group.layers}
    if windows != {index: layer.window for index, layer in enumerate(cache.layers)}:
        return Reason.OTHER_LAYERS
    return Reason.RECORDED_PAST if batch.record_past else None


def hand_over(cache: DynamicCache, request: Request, pool: KVPool, keys: Sequence[KVCacheSpec]) -> None:
    """Let an empty cache of one row hold what `request` has stored, as if its forwards had gone through the cache.

    The cache owns a reference to each block from now on. Called under the pool's lock.

    Parameters
    ----------
    cache : DynamicCache
        Its layers are paged. Changed in place.
    request : Request
        A row without pads; not changed.
    keys : sequence of KVCacheSpec
        The attention group of each of the request's tables.
    """
    batch = cache.layers[0].batch
    batch.bind(pool)
    batch.batch_size = 1
    for key, table in zip(keys, request.tables):
        group = pool.groups[key]
        batch.groups[key] = rows = GroupRows(group, 0)
        rows.tables = [table.fork()]
        for index, storage in group.layers.items():
            rows.lengths[index] = request.num_stored
            cache.layers[index].lazy_initialization(*(storage.new_states(is_key, 1, 0) for is_key in (True, False)))
            cache.layers[index].epoch = batch.epoch
