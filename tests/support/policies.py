"""Eviction policies as someone outside would add them."""

import random

from hf_paged.memory.eviction import LeastRecentlyUsed


class MostRecentlyUsed(LeastRecentlyUsed):
    """Gives up the block that was freed last."""

    def pop(self):
        return self._blocks.popitem(last=True)[0]


class AnyBlock:
    """Gives up a block by chance, always the same of the same blocks."""

    def __init__(self):
        self._blocks, self._chance = [], random.Random(0)

    def add(self, block):
        self._blocks.append(block)

    def remove(self, block):
        self._blocks.remove(block)

    def pop(self):
        return self._blocks.pop(self._chance.randrange(len(self._blocks)))

    def __contains__(self, block):
        return block in self._blocks

    def __len__(self):
        return len(self._blocks)

    def __iter__(self):
        return iter(self._blocks)
