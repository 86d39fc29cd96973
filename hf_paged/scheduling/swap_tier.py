"""SwapTier: what the prefix cache has in the swap space, and what is on its way there or back. No tensors here.

The ids of swap blocks are those of a `BlockPool`: one that holds a block is cached in it, and the one used longest ago
makes room. While a block moves, its swap block is in use.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.kv_pool import SwapCounts
from hf_paged.memory.swap_costs import SwapCosts
from hf_paged.scheduling.request import Request

if TYPE_CHECKING:
    from hf_paged.scheduling.prefix_cache import Entry

Moves = list[list[tuple[int, int]]]  # For each KV cache group: (source, destination).


class Move(NamedTuple):
    """A block of a group and its swap block; the step under way copies one to the other."""

    entry: "Entry"
    number: int
    block: int
    swap_block: int


class SwapTier:
    """The swap blocks of one prefix cache.

    A block that is spilled can be found when the step that spills it is committed, and a block that is restored when
    the step that restores it is.

    Parameters
    ----------
    num_blocks : sequence of int
        Swap blocks of each KV cache group.
    costs : SwapCosts
        Tell whether moving a block pays.
    counts : SwapCounts or None
        Counted up here, and read by the owner; None: new ones.

    Attributes
    ----------
    on_lost : callable
        Called with an entry that a group has lost its swap block of.
    """

    def __init__(self, num_blocks: Sequence[int], costs: SwapCosts, counts: SwapCounts | None = None):
        self.pools = [BlockPool(count, block_size=1) for count in num_blocks]
        self.costs = costs
        self.counts = SwapCounts() if counts is None else counts
        self.on_lost: Callable[[Entry], None] = lambda entry: None
        self._entry_of: list[dict[int, Entry]] = [{} for _ in num_blocks]  # For each group, by swap block.
        self._forgetters = [functools.partial(self._forget, number) for number in range(len(num_blocks))]
        self._is_planning = False
        self._spills: list[Move] = []
        self._restores: dict[Request, list[Move]] = {}

    def begin(self) -> None:
        """A step is planned from now on: blocks that are evicted for it may be spilled by it."""
        self._is_planning = True

    def spill(self, entry: "Entry", number: int, block: int) -> None:
        """Have the step that is planned spill a block of group `number` which is evicted, if that pays."""
        pool = self.pools[number]
        if self._is_planning and entry.swap_blocks[number] is None and self.costs.spilling_pays and pool.spare_blocks:
            [swap_block] = pool.allocate(1)
            self._spills.append(Move(entry, number, block, swap_block))

    def restore(
        self, request: Request, spilled: "Sequence[tuple[int, Entry]]", pools: Sequence[BlockPool]
    ) -> "dict[tuple[int, Entry], int]":
        """Have the step that is planned restore blocks of a row, to new ones, which the row owns.

        Parameters
        ----------
        request : Request
        spilled : sequence of (group number, Entry)
        pools : sequence of BlockPool
            Of the groups.

        Returns
        -------
        dict of (group number, Entry) to int
            The new blocks.

        Raises
        ------
        OutOfBlocksError
            If there are too few. Nothing is changed then.
        """
        moves: list[Move] = []
        pinned = [(number, _swap_block(entry, number)) for number, entry in spilled]
        for number, swap_block in pinned:  # All of them first: what is evicted for the new blocks is spilled, too.
            self.pools[number].touch([swap_block])
        try:
            for (number, entry), (_, swap_block) in zip(spilled, pinned):
                [block] = pools[number].allocate(1)
                moves.append(Move(entry, number, block, swap_block))
        except BaseException:
            for move in moves:
                pools[move.number].free([move.block])
            for number, swap_block in pinned:
                self.unpin(number, swap_block)
            raise
        if moves:
            self._restores[request] = moves
        return {(move.number, move.entry): move.block for move in moves}

    def withdraw(self, request: Request) -> None:
        """Restore nothing for a row, which gives its blocks back."""
        for move in self._restores.pop(request, []):
            self.unpin(move.number, move.swap_block)

    def is_restoring(self, request: Request) -> bool:
        """Tell whether the step under way restores blocks of a row."""
        return request in self._restores

    @property
    def moving_hashes(self) -> set[bytes]:
        """Block hashes of what the step that is planned spills or restores."""
        moves = [*self._spills, *(move for moves in self._restores.values() for move in moves)]
        return {move.entry.block_hash for move in moves}

    def end(self, pools: Sequence[BlockPool]) -> tuple[Moves, Moves]:
        """The step is planned: (block, swap block) to spill and (swap block, block) to restore, for each group.

        What is spilled has an owner in the step, whose rows stay until it is over. A block without one, as it was for
        a row that was preempted meanwhile, may be given to anyone before it is read: it is not spilled.
        """
        self._is_planning = False
        for move in [move for move in self._spills if not pools[move.number].ref_count(move.block)]:
            self._spills.remove(move)
            self.unpin(move.number, move.swap_block)
        spills: Moves = [[] for _ in self.pools]
        restores: Moves = [[] for _ in self.pools]
        for move in self._spills:
            spills[move.number].append((move.block, move.swap_block))
        for moves in self._restores.values():
            for move in moves:
                restores[move.number].append((move.swap_block, move.block))
        return spills, restores

    def settle(self) -> tuple[list[Move], list[tuple[Request, Move]]]:
        """The step is over: what it was to spill and to restore. Nothing is on its way any more.

        The swap blocks of the spills are the caller's, for `enter` or `unpin`.
        """
        spills, self._spills = self._spills, []
        restores = [(request, move) for request, moves in self._restores.items() for move in moves]
        for _, move in reversed(restores):  # The deepest block first: what comes before it is of use without it.
            self.unpin(move.number, move.swap_block)
        self._restores, self._is_planning = {}, False
        return spills, restores

    def enter(self, entry: "Entry", move: Move) -> None:
        """Note that a swap block holds a block of an entry."""
        if entry.swap_blocks[move.number] is None:
            entry.swap_blocks[move.number] = move.swap_block
            self._entry_of[move.number][move.swap_block] = entry
            self.pools[move.number].keep(move.swap_block, self._forgetters[move.number])
        self.unpin(move.number, move.swap_block)

    def drop(self) -> None:
        """Forget every swap block, and what is on its way there."""
        for pool, entry_of in zip(self.pools, self._entry_of):
            for swap_block in list(entry_of):
                pool.evict(swap_block)
        while self._spills:
            move = self._spills.pop()
            self.unpin(move.number, move.swap_block)

    def unpin(self, number: int, swap_block: int) -> None:
        """Let a swap block make room again; it is free if it holds nothing that can be found."""
        self.pools[number].free([swap_block])

    def check_integrity(self, entries: "Sequence[Entry]") -> None:
        """Check that counts add up, and that swap blocks and entries know each other.

        Raises
        ------
        AssertionError
            With the broken invariant.
        """
        moves = [*self._spills, *(move for moves in self._restores.values() for move in moves)]
        for number, (pool, entry_of) in enumerate(zip(self.pools, self._entry_of)):
            pool.check_integrity([move.swap_block] for move in moves if move.number == number)
            known = {e.swap_blocks[number]: e for e in entries if e.swap_blocks[number] is not None}
            assert known == entry_of, "an entry and its swap block do not know each other"
            assert pool.free_blocks + pool.cached_blocks + pool.used_blocks == pool.total_blocks
            kept = [swap_block for swap_block in range(pool.high_water) if pool.is_kept(swap_block)]
            assert kept == sorted(entry_of), "a swap block is kept that no entry knows"

    def _forget(self, number: int, swap_block: int) -> None:
        """A swap block of group `number` is evicted."""
        entry = self._entry_of[number].pop(swap_block)
        entry.swap_blocks[number] = None
        self.on_lost(entry)


def _swap_block(entry: "Entry", number: int) -> int:
    swap_block = entry.swap_blocks[number]
    assert swap_block is not None, "a block that is not in the swap space cannot be restored"
    return swap_block
