"""The scheduler: which rows run which of their tokens in the next step. No tensors here.

First come, first served. A step mixes decode tokens and chunks of prompts under a token budget. When blocks
run out, the row that came last is preempted: its blocks are freed, and it runs its tokens again later.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .block_table import make_writable
from .errors import OutOfBlocksError
from .pool import BlockPool
from .request import Request


class Group(Protocol):
    """What the scheduler knows of an attention group."""

    blocks: BlockPool
    window: int | None
    allocate: Callable[[int], list[int]]  # Beyond the budget, with a warning, if need be.


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start .. end - 1`` of a row run in this step."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the row's next token will be sampled from the last of these."""
        return self.end == len(self.request.tokens)


@dataclass(frozen=True)
class Schedule:
    """One step.

    Attributes
    ----------
    chunks : list of Chunk
        In order of arrival.
    copies : list of list of (source, destination)
        For each group the blocks to copy before anything is written (copy-on-write).
    failed : list of (Request, OutOfBlocksError)
        Rows that the whole pool cannot hold; they are out.
    """

    chunks: list[Chunk]
    copies: list[list[tuple[int, int]]]
    failed: list[tuple[Request, OutOfBlocksError]]


class Scheduler:
    """Waiting and running rows of all calls on one pool.

    Not locked: the engine calls it under the pool's lock.

    Parameters
    ----------
    groups : sequence of Group
        The model's attention groups.
    token_budget : int
        Tokens that one step may run.
    """

    def __init__(self, groups: Sequence[Group], token_budget: int):
        self.groups, self.token_budget = groups, token_budget
        self.waiting: list[Request] = []  # Both in order of arrival.
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a new row."""
        request.order = next(self._arrivals)
        self.waiting.append(request)

    def follow(self, request: Request) -> None:
        """Let the followers of a row whose prompt is stored run: over the same blocks, until they diverge."""
        for follower in request.followers:
            follower.order = next(self._arrivals)
            follower.tables = [table.fork() for table in request.tables]
            follower.num_stored = request.num_stored
            self.running.append(follower)
        request.followers = []

    def remove(self, request: Request) -> None:
        """Take a row out, finished or not; its blocks are free at once."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        request.release()

    def schedule(self) -> Schedule:
        """Choose the next step and make room for it. Rows that are being sampled sit it out."""
        step = Schedule([], [[] for _ in self.groups], [])
        left, preempted = self.token_budget, False
        for request in list(self.running):
            if request.num_pending == 0 or left == 0 or request not in self.running:
                continue
            count = min(request.num_pending, left)
            while request in self.running and not self._make_room(request, count, step):
                preempted = True
                self._yield_blocks(request, step)
            if request in self.running:
                left -= self._take(request, count, step)
        while self.waiting and left and not preempted and self._fits(self.waiting[0], step):
            request = self.waiting.pop(0)
            bisect.insort(self.running, request, key=lambda row: row.order)
            count = min(request.num_pending, left)
            made = self._make_room(request, count, step)
            assert made, "a row that fits found no room"
            left -= self._take(request, count, step)
        return step

    def done(self, step: Schedule) -> None:
        """Note that a step has run: its tokens are stored."""
        for chunk in step.chunks:
            chunk.request.num_stored = chunk.end

    @staticmethod
    def _take(request: Request, count: int, step: Schedule) -> int:
        step.chunks.append(Chunk(request, request.num_stored, request.num_stored + count))
        return count

    def _make_room(self, request: Request, count: int, step: Schedule, beyond: bool = False) -> bool:
        """Blocks for the row's next `count` tokens in every group; False if some group has too few."""
        start, end = request.num_stored, request.num_stored + count
        for index, (group, table) in enumerate(zip(self.groups, request.tables)):
            if group.window is not None:
                table.evict_before(start - (group.window - 1))
            try:
                allocate = group.allocate if beyond else group.blocks.allocate
                step.copies[index].extend(make_writable([table], [(start, end)], allocate))
            except OutOfBlocksError:
                return False
        return True

    def _yield_blocks(self, request: Request, step: Schedule) -> None:
        """Free blocks for `request`: preempt the row that came last, or let a row alone go past the budget."""
        last = self.running[-1]
        if last is not request or len(self.running) > 1:
            self._preempt(last, step)
            return
        # Alone, and still no room: caches outside the scheduler hold the blocks, or the pool is too small.
        self._need_all(request, step)

    def _need_all(self, request: Request, step: Schedule) -> None:
        count = min(request.num_pending, self.token_budget)
        error = self._shortage(request)
        if error is None and self._make_room(request, count, step, beyond=True):
            return
        step.failed.append((request, error or OutOfBlocksError(*self._demand(request))))
        self.remove(request)

    def _preempt(self, request: Request, step: Schedule) -> None:
        """Free a running row's blocks and queue it where it was; it runs all its tokens again."""
        self.running.remove(request)
        for copies, table in zip(step.copies, request.tables):
            # Its blocks may go to another row in this very step, and be copied to for that one.
            copies[:] = [copy for copy in copies if copy[1] not in table.blocks]
        request.release()
        request.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, request, key=lambda row: row.order)

    def _fits(self, request: Request, step: Schedule) -> bool:
        """Whether the row's tokens and one more find room beside what running prompts still need."""
        error = self._shortage(request)
        if error is not None:
            step.failed.append((request, error))
            self.remove(request)
            return bool(self.waiting) and self._fits(self.waiting[0], step)
        if all(self._available(index) >= self._blocks(request, index) for index in range(len(self.groups))):
            return True
        if self.running:
            return False
        # Nothing runs that could give blocks back: caches outside the scheduler hold them.
        count = min(request.num_pending, self.token_budget)
        return self._make_room(request, count, step, beyond=True)

    def _available(self, index: int) -> int:
        pool = self.groups[index].blocks
        promised = sum(self._blocks(row, index) - len(row.tables[index].blocks) for row in self.running)
        return pool.free_blocks + pool.cached_blocks - max(0, promised)

    def _blocks(self, request: Request, index: int) -> int:
        """Blocks that the row holds at most until its next token is sampled, and one token more."""
        group, size = self.groups[index], self.groups[index].blocks.block_size
        tokens = len(request.tokens) + 1
        if group.window is not None:
            tokens = min(tokens, group.window + self.token_budget + size)
        return -(-tokens // size)

    def _demand(self, request: Request) -> tuple[int, int, int]:
        """(needed, free, total) blocks of the group in which the row is furthest from fitting."""
        shortest = min(
            range(len(self.groups)), key=lambda i: self.groups[i].blocks.total_blocks - self._blocks(request, i)
        )
        pool = self.groups[shortest].blocks
        return self._blocks(request, shortest), pool.free_blocks + pool.cached_blocks, pool.total_blocks

    def _shortage(self, request: Request) -> OutOfBlocksError | None:
        """The error of a row that needs more blocks than there are; None if it could fit alone."""
        needed, free, total = self._demand(request)
        return OutOfBlocksError(needed, free, total) if needed > total else None
