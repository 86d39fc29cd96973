"""What a model's pool holds and did."""

from dataclasses import dataclass

import torch

from . import binding
from .kv_pool import GroupKey, KVPool


@dataclass(frozen=True)
class Stats:
    """Counts of a model's pool, summed over its attention groups.

    Attributes
    ----------
    total_blocks, used_blocks, cached_blocks, free_blocks : int
        ``free + cached + used == total``. All zero before the first token.
    block_size : int
        Tokens a block holds.
    tokens_stored : int
        Filled slots of the used blocks; a slot that several rows share counts once.
    waste : float
        Share of the used slots that hold no token: ``1 - tokens_stored / (used_blocks * block_size)``.
    page_reads : int
        Attention calls that read keys and values through block tables.
    gathers : dict of str to int
        Times that keys or values were copied out of the pages into a dense tensor, by reason.
    implementation : str
        The model's attention implementation now. Some models change it themselves: Whisper goes to "eager" for
        word timestamps, and stays there until ``model.set_attn_implementation("paged")``.
    """

    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    block_size: int
    tokens_stored: int
    waste: float
    page_reads: int
    gathers: dict[str, int]
    implementation: str


def stats(model: torch.nn.Module) -> Stats:
    """Statistics of `model`'s pool, or pools if it is made of several decoders.

    Parameters
    ----------
    model : PreTrainedModel or a module that contains some

    Returns
    -------
    Stats
    """
    pools = binding.pools_under(model)
    total = used = cached = free = tokens = reads = 0
    gathers: dict[str, int] = {}
    for pool in pools:
        with pool.lock:
            for key, group in pool.groups.items():
                blocks = group.blocks
                free, cached = free + blocks.free_blocks, cached + blocks.cached_blocks
                used, total = used + blocks.used_blocks, total + blocks.total_blocks
                tokens += _tokens_stored(pool, key)
            reads += pool.page_reads
            for reason, count in pool.gathers.items():
                gathers[reason] = gathers.get(reason, 0) + count
    block_size = pools[0].config.block_size if pools else binding.config_of(model).block_size
    waste = 1 - tokens / (used * block_size) if used else 0.0
    return Stats(total, used, cached, free, block_size, tokens, waste, reads, gathers, binding.implementation_of(model))


def _tokens_stored(pool: KVPool, key: GroupKey) -> int:
    filled: dict[int, int] = {}
    for cache in pool.caches:
        for table in cache.tables_in(key):
            left = table.num_tokens - table.base
            for block in table.blocks:
                filled[block] = max(filled.get(block, 0), min(left, pool.config.block_size))
                left -= pool.config.block_size
    return sum(filled.values())
