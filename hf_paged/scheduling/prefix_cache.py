"""PrefixCache: finds the blocks that already hold the beginning of a row. No tensors here.

A full block is a function of the tokens in it and before it, of the model, and of nothing else; so it is found
again by a chained hash over them, its block hash. Only rows of packed steps are hashed: their positions are the
default ones and token ids are all that the model is given.

A block that is evicted may be spilled to the swap space, and is found there under the same hash (`SwapTier`).
"""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hf_paged.errors import OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.kv_pool import PrefixCounts
from hf_paged.scheduling.request import Request, RequestState
from hf_paged.scheduling.swap_tier import Moves, SwapTier


@dataclass(frozen=True)
class Hit:
    """The longest beginning of a row that every KV cache group has.

    Attributes
    ----------
    num_blocks : int
        Its length.
    entries : list of list of Entry
        For each group the last of these blocks: all of them, or those that the window still sees.
    """

    num_blocks: int
    entries: "list[list[Entry]]"

    @property
    def blocks(self) -> list[list[int]]:
        """For each group those of its blocks that are in its pool."""
        return [
            [block for entry in of_group if (block := entry.blocks[number]) is not None]
            for number, of_group in enumerate(self.entries)
        ]

    @property
    def spilled(self) -> "list[tuple[int, Entry]]":
        """The others, which are in the swap space, with the numbers of their groups."""
        return [
            (number, entry)
            for number, of_group in enumerate(self.entries)
            for entry in of_group
            if entry.blocks[number] is None
        ]


class Entry:
    """A full block of tokens, and where each group has it: in its pool, in the swap space (None: not there)."""

    __slots__ = ("block_hash", "tokens", "blocks", "swap_blocks")

    def __init__(self, block_hash: bytes, tokens: bytes, num_groups: int):
        self.block_hash, self.tokens = block_hash, tokens
        self.blocks: list[int | None] = [None] * num_groups
        self.swap_blocks: list[int | None] = [None] * num_groups

    @property
    def is_empty(self) -> bool:
        """Tell whether no group has the block any more."""
        return all(place is None for place in (*self.blocks, *self.swap_blocks))


class PrefixCache:
    """Full blocks by the tokens that led to them.

    Owns no block: a block that it knows belongs to block tables, or is cached in its pool until it is evicted.
    Not locked: the scheduler calls it under the pool's lock.

    Parameters
    ----------
    pools : sequence of BlockPool
        One per KV cache group, in the order of a request's tables; all of one block size.
    windows : sequence of int or None
        The sliding window of each group.
    counts : PrefixCounts or None
        Counted up here, and read by the owner; None: new ones.
    tier : SwapTier or None
        The swap blocks of the same groups; None: there is no swap space.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        windows: Sequence[int | None],
        counts: PrefixCounts | None = None,
        tier: SwapTier | None = None,
    ):
        self.block_size = pools[0].block_size
        self.tier = tier
        if tier is not None:
            tier.on_lost = self._remove_if_empty
        self.counts = PrefixCounts() if counts is None else counts
        self._pools, self._windows = list(pools), list(windows)
        self._identity: bytes | None = b""  # None: suspended.
        self._drops = 0
        self._entries: dict[bytes, Entry] = {}
        self._entry_of: list[dict[int, Entry]] = [{} for _ in pools]  # For each group, by block.
        self._forgetters = [functools.partial(self._forget, number) for number in range(len(pools))]

    def use(self, identity: bytes) -> None:
        """Serve a model of this identity from now on; what was stored under another is dropped."""
        if identity != self._identity:
            self.drop()
            self._identity = identity

    def serves(self, identity: bytes) -> bool:
        """Tell whether `use` was called last for this identity, and nothing has suspended it since."""
        return self._identity == identity

    def suspend(self) -> None:
        """Forget every block, and look up and store nothing until `use` is called: the model is being changed."""
        if self._identity is not None:
            self.drop()
            self._identity = None

    @property
    def is_in_use(self) -> bool:
        """Tell whether blocks are looked up and stored."""
        return self._identity is not None

    def drop(self) -> None:
        """Forget every block; cached ones become free. Rows that run already store nothing any more."""
        for pool, entry_of in zip(self._pools, self._entry_of):
            for block in list(entry_of):
                pool.evict(block)
        if self.tier is not None:
            self.tier.drop()
        self._drops += 1

    def stop_swapping(self) -> None:
        """Forget what is in the swap space, and use it no more: it cannot be read or written."""
        if self.tier is not None:
            self.settle_moves(is_done=False)
            self.tier.drop()
            self.tier = None

    def match(self, request: Request, with_spilled: bool = True) -> Hit:
        """The stored beginning of a row. Takes nothing: good until the pools change.

        The row's last token is never part of it: its logits are wanted. Blocks in the swap space count if restoring
        them pays, and not without `with_spilled`.
        """
        best, runs = 0, [0] * len(self._pools)  # For each group: blocks in a row that are there, up to here.
        found: list[Entry | None] = []
        restores = with_spilled and self.tier is not None and self.tier.costs.restoring_pays
        self._anchor(request)
        for index in range(self._num_findable(request)):
            entry = self._find(request, index)
            found.append(entry)
            for number in range(len(runs)):
                is_there = entry is not None and (
                    entry.blocks[number] is not None or (restores and entry.swap_blocks[number] is not None)
                )
                runs[number] = runs[number] + 1 if is_there else 0
            enough = [run >= self._num_seen(number, index + 1) for number, run in enumerate(runs)]
            if all(enough):
                best = index + 1
            elif not all(is_enough or window for is_enough, window in zip(enough, self._windows)):
                break  # Full attention misses a block: it sees that of every longer beginning, too.
        seen = [found[best - self._num_seen(number, best) : best] for number in range(len(runs))]
        return Hit(best, [[entry for entry in of_group if entry is not None] for of_group in seen])

    def take(self, request: Request, hit: Hit) -> None:
        """Give a row that has no blocks what `match` found; it owns them, too.

        Blocks that are in the swap space get new ones, which the step restores them to: as far as there are any.
        """
        if request.salt is None:
            return
        try:
            owned = self._own(request, hit)
        except OutOfBlocksError:
            hit = self.match(request, with_spilled=False)
            owned = self._own(request, hit)
        num_tokens = hit.num_blocks * self.block_size
        for table, blocks in zip(request.tables, owned):
            table.start_at(num_tokens - len(blocks) * self.block_size)
            table.adopt(blocks, num_tokens)
        request.num_stored = num_tokens
        self.counts.lookups += 1
        self.counts.hit_tokens += num_tokens

    def plan_moves(self) -> None:
        """A step is planned from now on: what is evicted for it may be spilled."""
        if self.tier is not None:
            self.tier.begin()

    def planned_moves(self) -> tuple[Moves, Moves]:
        """The step is planned: (block, swap block) to spill, then (swap block, block) to restore, for each group.

        To be done in this order before the step copies or writes anything, and settled with `settle_moves`.
        """
        if self.tier is None:
            return [[] for _ in self._pools], [[] for _ in self._pools]
        return self.tier.end(self._pools)

    def settle_moves(self, is_done: bool) -> None:
        """The planned moves were made, or (`is_done` false) may not have been: what was moved can be found."""
        if self.tier is None:
            return
        spills, restores = self.tier.settle()
        for move in spills:
            if is_done:
                self.tier.enter(self._entries.setdefault(move.entry.block_hash, move.entry), move)
                self.tier.counts.spilled += 1
            else:
                self.tier.unpin(move.number, move.swap_block)
        for request, move in restores:
            # A row that was preempted or is out has given its blocks back; so has an entry that was dropped.
            if is_done and request.state is RequestState.RUNNING:
                self.tier.counts.restored += 1
                if self._entries.get(move.entry.block_hash) is move.entry:
                    self._keep(move.entry, move.number, move.block)

    def withdraw_moves(self, request: Request) -> None:
        """A row of the step that is planned gives its blocks back: nothing is restored for it."""
        if self.tier is not None:
            self.tier.withdraw(request)

    def is_restoring(self, request: Request) -> bool:
        """Tell whether the step under way restores blocks of a row."""
        return self.tier is not None and self.tier.is_restoring(request)

    def comes_soon(self, request: Request, hit: Hit) -> bool:
        """Tell whether the step that is planned moves a block that a row needs: the next step finds it in its place."""
        if self.tier is None or not (moving := self.tier.moving_hashes):
            return False
        return self.first_missing_hash(request, hit) in moving or any(e.block_hash in moving for _, e in hit.spilled)

    def first_missing_hash(self, request: Request, hit: Hit) -> bytes | None:
        """The block hash of the first block that `match` did not find; None if that block is never looked up."""
        if hit.num_blocks == self._num_findable(request):
            return None
        self._extend(request, hit.num_blocks + 1)
        return request.block_hashes[hit.num_blocks + 1]

    def completed_hashes(self, request: Request, start: int, end: int) -> list[bytes]:
        """Block hashes of the blocks that tokens ``start .. end - 1`` complete; none for a row that is not stored.

        None either for a block with a token that is known to the device only.
        """
        first, last = start // self.block_size, min(end, len(request.tokens)) // self.block_size
        if first == last or not self._is_anchored(request):
            return []
        self._extend(request, last)
        return request.block_hashes[first + 1 : last + 1]

    def store(self, request: Request, start: int, end: int) -> None:
        """Note that the blocks of tokens ``start .. end - 1`` of a running row are written."""
        first = start // self.block_size
        if first == end // self.block_size:
            return
        for index, block_hash in enumerate(self.completed_hashes(request, start, end), first):
            self._store_block(request, index, block_hash)

    def stored(self, request: Request) -> list[list[int]] | None:
        """All full blocks of a row, as `insert` takes them; None if some of them is nowhere. Takes nothing.

        Returns
        -------
        list of list of int or None
            For each group the last ``num_lasting`` of these blocks.
        """
        num_blocks = len(request.tokens) // self.block_size
        self._anchor(request)
        entries = [self._find(request, index) for index in range(num_blocks)] if self.is_in_use else [None] * num_blocks
        found: list[list[int]] = []
        for number in range(len(self._pools)):
            last = entries[num_blocks - self.num_lasting(number, num_blocks) :]
            blocks = [None if entry is None else entry.blocks[number] for entry in last]
            if None in blocks:
                return None
            found.append([block for block in blocks if block is not None])
        return found

    def insert(self, request: Request) -> None:
        """Note that all blocks of a row's tables are written, by whatever way: the row itself has run nowhere.

        Rows find them if each table holds the last `num_lasting` blocks of the row.
        """
        self._anchor(request)
        start = min(table.base for table in request.tables)
        hashes = self.completed_hashes(request, start, request.num_stored)
        for index, block_hash in enumerate(hashes, start // self.block_size):
            self._store_block(request, index, block_hash)

    def _store_block(self, request: Request, index: int, block_hash: bytes) -> None:
        """Enter a block of a row, in each group in which the row has it."""
        if block_hash not in self._entries:
            self._entries[block_hash] = Entry(block_hash, self._tokens(request, index), len(self._pools))
        entry = self._entries[block_hash]
        for number, table in enumerate(request.tables):
            if (place := index - table.base // self.block_size) >= 0:
                self._keep(entry, number, table.blocks[place])

    def num_lasting(self, number: int, num_blocks: int) -> int:
        """Blocks, of the first `num_blocks` of a row, that later rows look up in group `number`.

        Those that go on after these blocks, and those that end there: the last token of a row is never looked up.
        """
        return self._num_seen(number, num_blocks - 1) + 1

    def check_integrity(self) -> None:
        """Check that entries and blocks know each other, and that the pools keep no other block.

        Raises
        ------
        AssertionError
            With the broken invariant.
        """
        for number, (pool, entry_of) in enumerate(zip(self._pools, self._entry_of)):
            known = {e.blocks[number]: e for e in self._entries.values() if e.blocks[number] is not None}
            assert known == entry_of, "an entry and its block do not know each other"
            assert all(map(pool.is_kept, entry_of)), "an entry has a block that its pool does not keep"
        assert not any(entry.is_empty for entry in self._entries.values()), "an empty entry"
        if self.tier is not None:
            self.tier.check_integrity(list(self._entries.values()))

    def _forget(self, number: int, block: int) -> None:
        """A block of group `number` is evicted."""
        entry = self._entry_of[number].pop(block)
        entry.blocks[number] = None
        if self.tier is not None:
            self.tier.spill(entry, number, block)
        self._remove_if_empty(entry)

    def _remove_if_empty(self, entry: Entry) -> None:
        if entry.is_empty:
            del self._entries[entry.block_hash]

    def _keep(self, entry: Entry, number: int, block: int) -> None:
        """Note that a block of a running row is that of an entry, unless another row's is: this row keeps its own."""
        if entry.blocks[number] is None:
            self._pools[number].keep(block, self._forgetters[number])
            entry.blocks[number] = block
            self._entry_of[number][block] = entry

    def _own(self, request: Request, hit: Hit) -> list[list[int]]:
        """Own the blocks of a hit, for each group: those that are there, and new ones for those that are spilled.

        Raises
        ------
        OutOfBlocksError
            If there are too few for these. Nothing is owned then.
        """
        for pool, blocks in zip(self._pools, hit.blocks):
            pool.touch(blocks)  # All of them first: an allocation would evict them.
        try:
            new = {} if self.tier is None else self.tier.restore(request, hit.spilled, self._pools)
        except BaseException:
            for pool, blocks in zip(self._pools, hit.blocks):
                pool.free(reversed(blocks))
            raise
        return [
            [new[number, entry] if (block := entry.blocks[number]) is None else block for entry in of_group]
            for number, of_group in enumerate(hit.entries)
        ]

    def _find(self, request: Request, index: int) -> Entry | None:
        self._extend(request, index + 1)
        entry = self._entries.get(request.block_hashes[index + 1])
        return entry if entry is not None and entry.tokens == self._tokens(request, index) else None

    def _num_findable(self, request: Request) -> int:
        if request.salt is None or self._identity is None:
            return 0
        return (len(request.tokens) - 1) // self.block_size

    def _num_seen(self, number: int, num_blocks: int) -> int:
        """Blocks, of the first `num_blocks` of a row, that the next token sees in group `number`."""
        window = self._windows[number]
        if window is None:
            return num_blocks
        return num_blocks - max(0, num_blocks * self.block_size - (window - 1)) // self.block_size

    def _tokens(self, request: Request, index: int) -> bytes:
        return array("q", request.tokens[index * self.block_size : (index + 1) * self.block_size]).tobytes()

    def _root(self, salt: str) -> bytes:
        """The hash to which that of a row's first block is chained."""
        assert self._identity is not None, "suspended: nothing is hashed"
        parts = salt.encode(), self._identity, str(self._drops).encode()
        # Each with its length, so that no two lists of parts are hashed as the same bytes.
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()

    def _is_anchored(self, request: Request) -> bool:
        """Tell whether the row's blocks are stored under its block hashes: not if the model changed meanwhile."""
        if request.salt is None or self._identity is None:
            return False
        return request.block_hashes[:1] == [self._root(request.salt)]

    def _anchor(self, request: Request) -> None:
        """Begin the row's block hashes anew if its blocks would be stored under another root by now."""
        if request.salt is not None and self._identity is not None and not self._is_anchored(request):
            request.block_hashes = [self._root(request.salt)]

    def _extend(self, request: Request, num_blocks: int) -> None:
        """Hash the row's first `num_blocks` blocks, as far as they are not: that of block i is ``[i + 1]``."""
        hashes = request.block_hashes
        for index in range(len(hashes) - 1, num_blocks):
            hashes.append(hashlib.sha256(hashes[-1] + self._tokens(request, index)).digest())
