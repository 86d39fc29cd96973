"""Attention groups without tensors, for tests of the scheduler."""

from hf_paged.errors import OutOfBlocksError
from hf_paged.pool import BlockPool


class FakeGroup:
    """Blocks of 4 tokens, as a rule; past the budget the pool grows up to `capacity` as `GroupPool` does."""

    def __init__(self, num_blocks, window=None, capacity=0, block_size=4):
        self.blocks, self.window = BlockPool(num_blocks, block_size), window
        self.capacity = max(num_blocks, capacity)

    def allocate(self, num_blocks):
        try:
            return self.blocks.allocate(num_blocks)
        except OutOfBlocksError as error:
            if self.blocks.total_blocks + num_blocks - error.free > self.capacity:
                raise
            self.blocks.grow(num_blocks - error.free)
            return self.blocks.allocate(num_blocks)
