"""PrefixCache: finds the blocks that already hold the beginning of a row. No tensors here.

A full block is a function of the tokens in it and before it, of the model, and of nothing else; so it is found
again by a chained hash over them, its block hash. Only rows of packed steps are hashed: their positions are the
default ones and token ids are all that the model is given.
"""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.kv_pool import PrefixCounts
from hf_paged.scheduling.request import Request


@dataclass(frozen=True)
class Hit:
    """The longest beginning of a row that every KV cache group has.

    Attributes
    ----------
    num_blocks : int
        Its length.
    blocks : list of list of int
        For each group the last of these blocks: all of them, or those that the window still sees.
    """

    num_blocks: int
    blocks: list[list[int]]


class _Entry:
    """A full block of tokens, and where each KV cache group has it (None: nowhere)."""

    __slots__ = ("block_hash", "tokens", "blocks")

    def __init__(self, block_hash: bytes, tokens: bytes, num_groups: int):
        self.block_hash, self.tokens = block_hash, tokens
        self.blocks: list[int | None] = [None] * num_groups


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
    """

    def __init__(self, pools: Sequence[BlockPool], windows: Sequence[int | None], counts: PrefixCounts | None = None):
        self.block_size = pools[0].block_size
        self.counts = PrefixCounts() if counts is None else counts
        self._pools, self._windows = list(pools), list(windows)
        self._identity: bytes | None = b""  # None: suspended.
        self._drops = 0
        self._entries: dict[bytes, _Entry] = {}
        self._entry_of: list[dict[int, _Entry]] = [{} for _ in pools]  # For each group, by block.
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
        self._drops += 1

    def match(self, request: Request) -> Hit:
        """The stored beginning of a row. Takes nothing: good until the pools change.

        The row's last token is never part of it: its logits are wanted.
        """
        best, runs = 0, [0] * len(self._pools)  # For each group: blocks in a row that are there, up to here.
        found: list[list[int | None]] = [[] for _ in self._pools]
        self._anchor(request)
        for index in range(self._num_findable(request)):
            entry = self._find(request, index)
            for number, blocks in enumerate(found):
                block = None if entry is None else entry.blocks[number]
                blocks.append(block)
                runs[number] = 0 if block is None else runs[number] + 1
            enough = [run >= self._num_seen(number, index + 1) for number, run in enumerate(runs)]
            if all(enough):
                best = index + 1
            elif not all(is_enough or window for is_enough, window in zip(enough, self._windows)):
                break  # Full attention misses a block: it sees that of every longer beginning, too.
        seen = [blocks[best - self._num_seen(number, best) : best] for number, blocks in enumerate(found)]
        return Hit(best, [[block for block in blocks if block is not None] for blocks in seen])

    def take(self, request: Request, hit: Hit) -> None:
        """Give a row that has no blocks what `match` found; it owns them, too."""
        if request.salt is None:
            return
        num_tokens = hit.num_blocks * self.block_size
        for table, blocks in zip(request.tables, hit.blocks):
            table.start_at(num_tokens - len(blocks) * self.block_size)
            table.reuse(blocks, num_tokens)
        request.num_stored = num_tokens
        self.counts.lookups += 1
        self.counts.hit_tokens += num_tokens

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
            self._entries[block_hash] = _Entry(block_hash, self._tokens(request, index), len(self._pools))
        entry = self._entries[block_hash]
        for number, (pool, table) in enumerate(zip(self._pools, request.tables)):
            place = index - table.base // self.block_size
            if entry.blocks[number] is None and place >= 0:  # Else another row has stored it; this one keeps its own.
                block = table.blocks[place]
                pool.keep(block, self._forgetters[number])
                entry.blocks[number] = block
                self._entry_of[number][block] = entry

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
        assert all(any(block is not None for block in e.blocks) for e in self._entries.values()), "an empty entry"

    def _forget(self, number: int, block: int) -> None:
        """A block of group `number` is evicted."""
        entry = self._entry_of[number].pop(block)
        entry.blocks[number] = None
        if all(other is None for other in entry.blocks):
            del self._entries[entry.block_hash]

    def _find(self, request: Request, index: int) -> _Entry | None:
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
