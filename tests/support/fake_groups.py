"""KV cache groups without tensors, for tests of the scheduler."""

from hf_paged.errors import OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Scheduler


class WatchedPool(BlockPool):
    """Tells `on_hand_out` which blocks it hands out; evicts as many cached blocks as it must, and no more."""

    on_hand_out = staticmethod(lambda blocks: None)

    def allocate(self, num_blocks):
        fresh, cached, evictions = self.fresh_blocks, self.cached_blocks, self.num_evictions
        wanted = max(0, num_blocks - (self.free_blocks - fresh))  # Blocks that were used before come first.
        recycled = min(wanted, max(0, cached - self.cache_blocks))
        blocks = super().allocate(num_blocks)
        assert self.num_evictions - evictions == max(recycled, wanted - fresh)
        assert self.fresh_blocks == fresh - min(fresh, wanted - recycled)
        self.on_hand_out(blocks)
        return blocks


class FakeGroup:
    """Blocks of 4 tokens, as a rule; past the budget the pool grows up to `capacity` as `KVCacheGroup` does."""

    def __init__(self, num_blocks, window=None, capacity=0, block_size=4, policy=None, layer=0):
        self.blocks, self.window = WatchedPool(num_blocks, block_size, policy=policy), window
        self.layers = {layer: None}
        self.capacity = max(num_blocks, capacity)

    def allocate_or_grow(self, num_blocks):
        try:
            return self.blocks.allocate(num_blocks)
        except OutOfBlocksError as error:
            if self.blocks.total_blocks + num_blocks - error.free > self.capacity:
                raise
            self.blocks.grow(num_blocks - error.free)
            return self.blocks.allocate(num_blocks)


class Rows:
    """A scheduler over fake groups with blocks of 4 tokens, and rows that run through it."""

    def __init__(self, *groups, budget=64, tier=None):
        self.groups, self.scheduler = groups, Scheduler(groups, budget, None, tier)
        self.prefix = self.scheduler.prefix
        self.prefix.use(b"model")

    def arrive(self, tokens, salt=""):
        request = Request(list(tokens), [group.blocks for group in self.groups])
        request.salt = salt
        self.scheduler.add(request)
        return request

    def step(self):
        """Chunks of one step as (row, start, end); rows that are sampled are finished."""
        step = self.scheduler.schedule()
        self.scheduler.commit(step)
        for chunk in step.chunks:
            if chunk.samples:
                self.scheduler.remove(chunk.request)
        self.prefix.check_integrity()
        return [(chunk.request, chunk.start, chunk.end) for chunk in step.chunks]

    def run(self, tokens, salt=""):
        """Run one row to its end; returns the number of its tokens that were found."""
        self.arrive(tokens, salt)
        [(_, start, end), *_] = self.step()
        while end < len(tokens):
            [(_, _, end)] = self.step()
        return start
