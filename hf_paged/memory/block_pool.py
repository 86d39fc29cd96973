"""BlockPool: which blocks are free, cached or used, and by how many block tables. No tensors here."""

from collections import Counter, deque
from collections.abc import Callable, Iterable

from hf_paged.errors import BlockError, OutOfBlocksError
from hf_paged.memory.eviction import EvictionPolicy, LeastRecentlyUsed


class BlockPool:
    """Ids of fixed-size blocks with reference counts (Kwon et al., SOSP 2023).

    A block is in one of three states, and ``free + cached + used == total`` always holds:

    * free: it has no owner, its content is meaningless;
    * used: one or more block tables own it (the reference count);
    * cached: it has no owner, but its content was asked to be kept (`keep`). Its eviction policy chooses which one is
      evicted when an allocation finds no free block, or none but fresh ones while more than `cache_blocks` are cached.

    A fresh block is a free one with no memory behind it: it was never handed out, or its memory went back to the
    system (`vacate`).

    The pool is not locked: its owner calls it under a lock. `give_back` alone is safe from any thread
    and from a finalizer.

    Parameters
    ----------
    num_blocks : int
        Blocks to manage, ids ``0 .. num_blocks - 1``.
    block_size : int
        Tokens a block holds.
    cache_blocks : int or None
        Cached blocks for which fresh ones are taken; None: as many as there are.
    policy : EvictionPolicy or None
        New and empty; the pool owns it. None: the block freed longest ago is evicted first.
    """

    def __init__(
        self, num_blocks: int, block_size: int, cache_blocks: int | None = None, policy: EvictionPolicy | None = None
    ):
        self.block_size = block_size
        self.total_blocks = num_blocks
        self.cache_blocks = num_blocks if cache_blocks is None else cache_blocks
        self.num_evictions = 0  # Cached blocks that an allocation took.
        # Blocks are numbered as they are first handed out: a large pool costs nothing until it is used,
        # and the memory that is touched stays compact.
        self._ref_counts: list[int] = []
        self._free: list[int] = []
        self._vacated: list[int] = []  # In falling order: the lowest id is handed out first.
        self._cached: EvictionPolicy = LeastRecentlyUsed() if policy is None else policy
        self._kept: dict[int, Callable[[int], None]] = {}  # Used or cached block -> what to call at its eviction.
        self._holds: Counter[int] = Counter()  # Owners of used blocks that `hold` added.
        self._returned: deque[list[int]] = deque()
        self.reserved = 0  # Blocks, free or cached, that are promised to calls under way.

    @property
    def free_blocks(self) -> int:
        self._drain()
        return len(self._free) + self.fresh_blocks

    @property
    def fresh_blocks(self) -> int:
        """Free blocks for which an allocation takes memory from the system."""
        return len(self._vacated) + self.total_blocks - len(self._ref_counts)

    @property
    def cached_blocks(self) -> int:
        self._drain()
        return len(self._cached)

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - self.free_blocks - len(self._cached)

    @property
    def spare_blocks(self) -> int:
        """Blocks that an allocation can get: free or cached, and not promised to a call."""
        return max(0, self.free_blocks + len(self._cached) - self.reserved)

    @property
    def high_water(self) -> int:
        """One past the highest id ever handed out: on the CPU the memory of these blocks was taken from the system."""
        return len(self._ref_counts)

    def ref_count(self, block: int) -> int:
        """Block tables that own `block`; 0 if it is free or cached."""
        return self._ref_counts[block]

    def grow(self, num_blocks: int) -> None:
        """Add `num_blocks` free blocks."""
        self.total_blocks += num_blocks

    def shrink(self, num_blocks: int) -> None:
        """Take `num_blocks` free blocks away, or as many as were never handed out, but for a last one."""
        unnumbered = self.total_blocks - len(self._ref_counts)
        self.total_blocks -= max(0, min(num_blocks, unnumbered, self.total_blocks - 1))

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks, each with one owner: all of them or none.

        Raises
        ------
        OutOfBlocksError
            If fewer are free or cached and not reserved. The pool is left as it was.
        """
        available = self.spare_blocks
        if num_blocks > available:
            raise OutOfBlocksError(num_blocks, available, self.total_blocks)
        blocks = []
        for _ in range(num_blocks):
            if self._free:  # The last one freed is the likeliest to be in a CPU cache.
                block = self._free.pop()
            elif self.fresh_blocks and len(self._cached) <= self.cache_blocks:
                block = self._take_fresh()
            else:
                block = self._cached.pop()
                self._kept.pop(block)(block)
                self.num_evictions += 1
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def _take_fresh(self) -> int:
        if self._vacated:
            return self._vacated.pop()
        self._ref_counts.append(0)
        return len(self._ref_counts) - 1

    def touch(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of `blocks`, their content untouched; cached ones are in use again.

        Raises
        ------
        BlockError
            If one of them is free. The pool is left as it was.
        """
        blocks = list(blocks)
        for block in blocks:
            if self._ref_counts[block] == 0 and block not in self._cached:
                raise BlockError(f"block {block} is free: what it held is lost, and it cannot be shared")
        for block in blocks:
            if self._ref_counts[block] == 0:
                self._cached.remove(block)
            self._ref_counts[block] += 1

    def hold(self, block: int) -> None:
        """Let one owner of a block only keep it from being handed out: `is_shared` does not count it any more."""
        self._holds[block] += 1

    def let_go(self, block: int) -> None:
        """Undo `hold`, and free the block."""
        self._holds[block] -= 1
        self._holds += Counter()  # Without those that are zero.
        self.free([block])

    def is_shared(self, block: int, but: int = 0) -> bool:
        """Tell whether several rows own `block`, `but` of them not counted: a row copies it before it writes to it."""
        return self._ref_counts[block] - self._holds[block] - but > 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take an owner from each of `blocks`; those without any become free or, if they are kept, cached.

        Of blocks that become cached, the first should be evicted first.

        Raises
        ------
        BlockError
            If one of them is not in use (a double free). Blocks before it in the order are freed.
        """
        for block in blocks:
            if self._ref_counts[block] == 0:
                raise BlockError(f"block {block} is freed twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._kept:
                    self._cached.add(block)
                else:
                    self._free.append(block)

    def keep(self, block: int, on_eviction: Callable[[int], None]) -> None:
        """Let a used block become cached, not free, when its last owner frees it.

        Parameters
        ----------
        on_eviction : callable
            Called with `block` when its content is about to be lost, by `allocate` or `evict`. It must not
            call the pool.

        Raises
        ------
        BlockError
            If the block is not in use, or kept already.
        """
        if self._ref_counts[block] == 0 or block in self._kept:
            raise BlockError(f"block {block} is not in use, or kept already: it cannot be kept")
        self._kept[block] = on_eviction

    def is_kept(self, block: int) -> bool:
        """Tell whether `keep` was called for what `block` holds."""
        return block in self._kept

    def evict(self, block: int) -> None:
        """Undo `keep`: its `on_eviction` is called, and a cached block becomes free."""
        self._kept.pop(block)(block)
        if block in self._cached:
            self._cached.remove(block)
            self._free.append(block)

    def evict_down_to(self, num_blocks: int) -> None:
        """Undo `keep` for cached blocks, in the order of the eviction policy, until `num_blocks` are left."""
        while self.cached_blocks > num_blocks:
            block = self._cached.pop()
            self._kept.pop(block)(block)
            self._free.append(block)

    def vacate(self, num_left: int) -> list[int]:
        """Make free blocks fresh, all but the `num_left` that were freed last.

        Returns
        -------
        list of int
            In rising order. Their memory is the caller's to give back, before the next allocation.
        """
        self._drain()
        end = max(0, len(self._free) - num_left)
        vacated = sorted(self._free[:end])
        del self._free[:end]
        self._vacated = sorted(self._vacated + vacated, reverse=True)
        return vacated

    def give_back(self, blocks: list[int]) -> None:
        """Free `blocks` at the next call on the pool.

        A finalizer can run at any point, even inside another method of this pool; so it only queues.
        """
        self._returned.append(blocks)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Check that counts add up and that `tables`, the ids of every live table, own what is used.

        Raises
        ------
        AssertionError
            With the broken invariant.
        """
        self._drain()
        owners = [0] * len(self._ref_counts)
        for blocks in tables:
            for block in blocks:
                owners[block] += 1
        free, cached = {*self._free, *self._vacated}, set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count > 0}
        unnumbered = self.total_blocks - len(self._ref_counts)
        assert len(free) == len(self._free) + len(self._vacated), "a block is free twice"
        assert len(cached) == len(self._cached), "the eviction policy counts its blocks wrong"
        assert not (free & cached or free & used or cached & used), "a block is in two states"
        assert cached <= self._kept.keys() <= cached | used, "a cached block is not kept, or a free one is"
        assert len(free) + unnumbered + len(cached) + len(used) == self.total_blocks, "free + cached + used != total"
        assert owners == self._ref_counts, "reference counts differ from the owners in the block tables"

    def _drain(self) -> None:
        while self._returned:
            self.free(self._returned.popleft())
