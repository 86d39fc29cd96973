"""Every pool that a test makes: its unused slots hold NaN, and it is known until it dies."""

import weakref
from dataclasses import replace

import torch

from hf_paged.memory.kv_pool import KVCacheGroup, KVPool
from hf_paged.memory.swap_space import SwapSpace

pools: "weakref.WeakSet[KVPool]" = weakref.WeakSet()


def poison(dtype: torch.dtype) -> float:
    """A number that no token may be computed from: NaN, or the largest one of a dtype without NaN."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def poison_new_slots() -> None:
    """Fill slots with NaN whenever they are handed out, so that a read past the context shows.

    A block that a step is about to spill is filled when it was.
    """
    group_init, layer, init = KVCacheGroup.__init__, KVCacheGroup.layer, KVPool.__init__
    move = SwapSpace.move

    def poisoned_init(self, *args):
        group_init(self, *args)
        allocate = self.blocks.allocate

        def poisoned_allocate(num_blocks):
            blocks = allocate(num_blocks)
            fill(self, [block for block in blocks if block not in spilled_blocks(self)])
            return blocks

        self.blocks.allocate = poisoned_allocate

    def poisoned_layer(self, index, key, value):
        is_new = index not in self.layers
        storage = layer(self, index, key, value)
        if is_new:
            for page in storage.pages:
                page[: self.blocks.high_water] = poison(page.dtype)
        return storage

    def poisoned_move(self, spills, restores):
        first = move(self, spills, [[] for _ in restores])
        for group, moves in zip(groups_of(self), spills):
            fill(group, [block for block, _ in moves])
        second = move(self, [[] for _ in spills], restores)
        return replace(second, spilled=first.spilled, spill_seconds=first.spill_seconds)

    def tracked_init(self, config):
        init(self, config)
        pools.add(self)

    KVCacheGroup.__init__, KVCacheGroup.layer, KVPool.__init__ = poisoned_init, poisoned_layer, tracked_init
    SwapSpace.move = poisoned_move


def fill(group: KVCacheGroup, blocks: list[int]) -> None:
    """Fill the slots of some blocks with NaN."""
    with torch.no_grad():
        for storage in group.layers.values():
            for page in storage.pages:
                page[torch.tensor(blocks, dtype=torch.long)] = poison(page.dtype)


def engines() -> list:
    return [engine for pool in list(pools) for engine in list(pool.engines)]


def groups_of(space: SwapSpace) -> list[KVCacheGroup]:
    """The KV cache groups whose blocks an engine moves to a swap space."""
    return [group for engine in engines() if engine._swap_space is space for group in engine.scheduler.groups]


def spilled_blocks(group: KVCacheGroup) -> set[int]:
    """The blocks of a group that the step which is planned will spill."""
    return {
        move.block
        for engine in engines()
        if engine.scheduler.prefix.tier is not None
        for move in engine.scheduler.prefix.tier._spills
        if engine.scheduler.groups[move.number] is group
    }
