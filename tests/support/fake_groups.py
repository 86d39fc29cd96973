"""Attention groups without tensors, for tests of the scheduler."""

from hf_paged.errors import OutOfBlocksError
from hf_paged.pool import BlockPool


class WatchedPool(BlockPool):
    """Tells `on_hand_out` which blocks it hands out; evicts as many cached blocks as it must, and no more."""

    on_hand_out = staticmethod(lambda blocks: None)

    def allocate(self, num_blocks):
        fresh, cached, evictions = self.total_blocks - self.high_water, self.cached_blocks, self.num_evictions
        wanted = max(0, num_blocks - (self.free_blocks - fresh))  # Blocks that were used before come first.
        recycled = min(wanted, max(0, cached - self.cache_blocks))
        blocks = super().allocate(num_blocks)
        assert self.num_evictions - evictions == max(recycled, wanted - fresh)
        assert self.high_water == self.total_blocks - fresh + min(fresh, wanted - recycled)
        self.on_hand_out(blocks)
        return blocks


class FakeGroup:
    """Blocks of 4 tokens, as a rule; past the budget the pool grows up to `capacity` as `GroupPool` does."""

    def __init__(self, num_blocks, window=None, capacity=0, block_size=4):
        self.blocks, self.window = WatchedPool(num_blocks, block_size), window
        self.capacity = max(num_blocks, capacity)

    def allocate(self, num_blocks):
        try:
            return self.blocks.allocate(num_blocks)
        except OutOfBlocksError as error:
            if self.blocks.total_blocks + num_blocks - error.free > self.capacity:
                raise
            self.blocks.grow(num_blocks - error.free)
            return self.blocks.allocate(num_blocks)
