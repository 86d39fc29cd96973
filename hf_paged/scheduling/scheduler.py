"""The scheduler: which rows run which of their tokens in the next step. No tensors here.

First come, first served. A step mixes decode tokens and chunks of prompts under a token budget. When blocks
run out, the row that came last is preempted: its blocks are freed, and it runs its tokens again later. A row
that starts takes what the prefix cache has of it, and runs the rest.

A row may run one token ahead: with a token that only the device knows (`Request.runs_ahead`). As that may be its last
one, the row takes room that is spare, and costs neither another row its blocks nor itself an error.
"""

import bisect
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from hf_paged.errors import OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.kv_pool import PrefixCounts
from hf_paged.memory.sizing import row_blocks
from hf_paged.scheduling.prefix_cache import Hit, PrefixCache
from hf_paged.scheduling.request import Request, RequestState
from hf_paged.scheduling.swap_tier import Moves, SwapTier

_GroupCopy = tuple[int, tuple[int, int]]  # Number of a group, and (source, destination) in it.


class CacheGroup(Protocol):
    """The part of a `KVCacheGroup` that the scheduler uses."""

    blocks: BlockPool

    @property
    def window(self) -> int | None:
        """Sliding window in tokens; None: full attention."""

    def allocate_or_grow(self, num_blocks: int) -> list[int]:
        """Take blocks, past the budget if it does not hold them.

        Raises
        ------
        OutOfBlocksError
            If the memory of the device cannot hold them. Nothing is changed.
        """


class Chunk(NamedTuple):  # Made for every row of every step: a frozen dataclass takes twice as long.
    """Tokens ``start .. end - 1`` of a row run in this step."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Tell whether the row's next token will be sampled from the last of these."""
        return self.end == self.request.num_tokens

    @property
    def is_ahead(self) -> bool:
        """Tell whether the last of these is known to the device only."""
        return self.end > len(self.request.tokens)

    @property
    def tokens(self) -> list[int]:
        """These tokens, with 0 for one that is known to the device only."""
        return self.request.tokens[self.start : self.end] + [0] * self.is_ahead


@dataclass(frozen=True)
class SchedulerOutput:
    """One step.

    Attributes
    ----------
    chunks : list of Chunk
        In order of arrival.
    copies : list of list of (source, destination)
        For each group the blocks to copy before anything is written (copy-on-write). The scheduler holds the
        sources until the step is committed or aborted.
    failed : list of (Request, OutOfBlocksError)
        Rows that the whole pool cannot hold; they are out.
    spills : list of list of (block, swap block)
        For each group what to move to the swap space, before anything else of the step.
    restores : list of list of (swap block, block)
        For each group what to bring back from there, before anything is copied or written.
    """

    chunks: list[Chunk]
    copies: list[list[tuple[int, int]]]
    failed: list[tuple[Request, OutOfBlocksError]]
    spills: Moves = field(default_factory=list)
    restores: Moves = field(default_factory=list)


class Scheduler:
    """Waiting and running rows of all calls on one pool.

    Not locked: the engine calls it under the pool's lock.

    Parameters
    ----------
    groups : sequence of CacheGroup
        The model's KV cache groups.
    token_budget : int
        Tokens that one step may run.
    prefix_counts : PrefixCounts or None
        Counted up by the prefix cache; None: new ones.
    tier : SwapTier or None
        The swap blocks of the groups; None: there is no swap space.
    row_budget : int or None
        Rows whose tokens one step may run; None: as many as tokens.

    Attributes
    ----------
    prefix : PrefixCache
        Of the groups' pools.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        token_budget: int,
        prefix_counts: PrefixCounts | None = None,
        tier: SwapTier | None = None,
        row_budget: int | None = None,
    ):
        self.groups, self.token_budget = groups, token_budget
        self.row_budget = token_budget if row_budget is None else row_budget
        pools, windows = [group.blocks for group in groups], [group.window for group in groups]
        self.prefix = PrefixCache(pools, windows, prefix_counts, tier)
        self.waiting: list[Request] = []  # Both in order of arrival.
        self.running: list[Request] = []
        self.held: list[list[int]] = [[] for _ in groups]  # Sources of the copies of the step under way.
        self.num_preemptions = 0
        self._queues = {RequestState.WAITING: self.waiting, RequestState.RUNNING: self.running}
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a new row. Its duplicates arrive with it, whenever they start."""
        for row in (request, *request.duplicates):
            row.order = next(self._arrivals)
        self._move(request, RequestState.WAITING)

    def start_duplicates(self, request: Request) -> None:
        """Let the duplicates of a row whose prompt is stored run: over the same blocks, until they diverge."""
        for duplicate in request.duplicates:
            if duplicate.state is RequestState.OUT:
                continue
            duplicate.tables = [table.fork() for table in request.tables]
            duplicate.num_stored, duplicate.num_sampled = request.num_stored, request.num_sampled
            duplicate.block_hashes = list(request.block_hashes)
            self._move(duplicate, RequestState.RUNNING)
        request.duplicates = []

    def remove(self, request: Request) -> None:
        """Take a row out, finished or not, with the duplicates that never ran; its blocks are free at once."""
        for row in (request, *request.duplicates):
            self._move(row, RequestState.OUT)
            row.release()

    def schedule(self, admits_waiting: bool = True, may_exceed_budget: bool = True) -> SchedulerOutput:
        """Choose the next step and make room for it. Rows that are being sampled sit it out.

        The step before is committed or aborted. After an error no row has any blocks: all run their tokens again.

        Parameters
        ----------
        admits_waiting : bool
            Let waiting rows start beside running ones. False while a call waits until all blocks that it will need
            are free. Where no row runs, waiting ones start all the same.
        may_exceed_budget : bool
            Let a row that is alone, and has too few blocks, grow the pool. False while others will free blocks soon:
            it waits for them.
        """
        try:
            self.prefix.plan_moves()
            step = self._schedule(admits_waiting, may_exceed_budget)
        except BaseException:
            # Rows may own blocks whose copies are in no step.
            for request in reversed(self.running[:]):
                self._preempt(request)
            self._let_go()
            self.prefix.settle_moves(is_done=False)
            raise
        if not step.chunks:
            self._let_go()
            self.prefix.settle_moves(is_done=False)
        spills, restores = self.prefix.planned_moves()
        return replace(step, spills=spills, restores=restores)

    def _schedule(self, admits_waiting: bool, may_exceed_budget: bool) -> SchedulerOutput:
        step = SchedulerOutput([], [[] for _ in self.groups], [])
        left, preemptions = self.token_budget, self.num_preemptions
        for request in list(self.running):
            if left == 0 or len(step.chunks) >= self.row_budget:
                break
            if request.state is RequestState.RUNNING and not request.is_sampling and self._may_run(request):
                left -= self._run(request, left, step, may_exceed_budget)
        # What a preempted row gave up is not for those that wait: it was needed just now.
        has_preempted = self.num_preemptions > preemptions
        if self.waiting and left and not has_preempted and (admits_waiting or not self.running):
            self._admit(left, step, may_exceed_budget)
        return step

    def commit(self, step: SchedulerOutput) -> None:
        """Note that a step has run: its tokens are stored, and next tokens are being sampled.

        Parameters
        ----------
        step : SchedulerOutput
            With those of its chunks that have run. A row that has left meanwhile had its end before its chunk: nothing
            of that counts.
        """
        self._let_go()
        self.prefix.settle_moves(is_done=True)
        for chunk in step.chunks:
            if chunk.request.state is RequestState.OUT:
                continue
            chunk.request.num_stored = chunk.end
            self.prefix.store(chunk.request, chunk.start, chunk.end)
            if chunk.samples:
                chunk.request.num_sampled = chunk.end

    def abort(self, step: SchedulerOutput) -> None:
        """Note that a step has not run, or not to its end: its rows are as before it, but for those that `lose` names.

        What was evicted for it is lost.
        """
        self.lose(step)
        self._let_go()
        self.prefix.settle_moves(is_done=False)

    def lose(self, step: SchedulerOutput) -> None:
        """Have those rows of a step give their blocks up that may lack a copy, or what was to be restored."""
        missing = [{destination for _, destination in copies} for copies in step.copies]
        for chunk in step.chunks:
            is_short = any(not copied.isdisjoint(t.blocks) for copied, t in zip(missing, chunk.request.tables))
            is_short = is_short or self.prefix.is_restoring(chunk.request)
            if is_short and chunk.request.state is RequestState.RUNNING:
                self._preempt(chunk.request)

    def _let_go(self) -> None:
        """Free the sources of the last step's copies."""
        for group, held in zip(self.groups, self.held):
            while held:
                group.blocks.let_go(held.pop())

    def _move(self, request: Request, state: RequestState) -> None:
        """Take a row from the queue it is in to its place in that of `state`."""
        queue = self._queues.get(request.state)
        if queue is not None:
            del queue[bisect.bisect_left(queue, request.order, key=_order)]
        request.state = state
        if state in self._queues:
            bisect.insort(self._queues[state], request, key=_order)

    def _may_run(self, request: Request) -> bool:
        """Tell whether a running row need not wait for its token: one ahead, which runs a single one, needs room."""
        start = request.num_stored
        return not request.runs_ahead or all(
            group.blocks.spare_blocks or _is_private(table, start, start + 1)
            for group, table in zip(self.groups, request.tables)
        )

    def _run(self, request: Request, left: int, step: SchedulerOutput, may_exceed_budget: bool) -> int:
        """Add `left` tokens of a running row to the step at most; returns how many, 0 if the row itself must yield."""
        count = self._chunk_length(request, left)
        copies: list[_GroupCopy] = []
        while self._make_room(request, count, copies) is not None:
            self._yield_blocks(request, count, copies, step, may_exceed_budget)
            if request.state is not RequestState.RUNNING:
                for index, (source, _) in copies:
                    self.held[index].remove(source)
                    self.groups[index].blocks.let_go(source)
                return 0
        for index, pair in copies:
            step.copies[index].append(pair)
        step.chunks.append(Chunk(request, request.num_stored, request.num_stored + count))
        return count

    def _chunk_length(self, request: Request, left: int) -> int:
        """Tokens of the row's next chunk: fewer than `left` where a windowed group could not hold as many."""
        start, count = request.num_stored, min(request.num_pending, left)
        if count == 1:
            return 1
        for group in self.groups:
            if group.window is not None:
                pool = group.blocks
                first = max(0, start - (group.window - 1)) // pool.block_size
                count = min(count, (first + pool.total_blocks) * pool.block_size - start)
        return max(count, 1)

    def _admit(self, left: int, step: SchedulerOutput, may_exceed_budget: bool) -> None:
        """Start waiting rows, the first that came first, until one does not fit beside those that run.

        A row whose next block is computed or moved in this very step, for another row, starts in the next one and finds
        it; the blocks that it will need are kept for it.
        """
        spare = [self._spare(index) for index in range(len(self.groups))]
        underway: set[bytes] = set()
        for chunk in step.chunks:
            underway.update(self.prefix.completed_hashes(chunk.request, chunk.start, chunk.end))
        rows = sum(not request.is_sampling for request in self.running)  # Those that sample may take their time.
        for request in list(self.waiting):
            if left == 0 or rows >= self.row_budget:
                break
            if request.is_sampling:  # Preempted meanwhile. Its call may be slow: the others go on.
                continue
            error = self._shortage(request)
            if error is not None:
                self._fail(request, error, step)
                continue
            hit = self.prefix.match(request)
            blocks = [self._wanted(request, index, hit) for index in range(len(self.groups))]
            if (self.running or not may_exceed_budget) and any(map(operator.gt, blocks, spare)):
                break
            spare = list(map(operator.sub, spare, blocks))
            if self.prefix.first_missing_hash(request, hit) in underway or self.prefix.comes_soon(request, hit):
                continue
            self.prefix.take(request, hit)
            self._move(request, RequestState.RUNNING)
            rows += 1
            count = self._run(request, left, step, may_exceed_budget)
            left -= count
            underway.update(self.prefix.completed_hashes(request, request.num_stored, request.num_stored + count))
        step.chunks.sort(key=lambda chunk: chunk.request.order)

    def _wanted(self, request: Request, index: int, hit: Hit) -> int:
        """Free or cached blocks that a waiting row takes at most until its next token is sampled.

        Beside other rows one token ahead, so that it does not come in only to be preempted.
        """
        group, ahead = self.groups[index], bool(self.running)
        num_blocks = self._blocks(request, index, ahead, stored=hit.num_blocks * group.blocks.block_size)
        if group.window is not None:  # What it shares there it gives up soon, and that frees no block.
            return num_blocks
        return num_blocks - sum(group.blocks.ref_count(block) > 0 for block in hit.blocks[index])

    def _make_room(
        self, request: Request, count: int, copies: list[_GroupCopy], may_grow: bool = False
    ) -> OutOfBlocksError | None:
        """Take blocks for the row's next `count` tokens in every group; returns the error of the first with too few.

        What groups before that one gave stays with the row. Appends to `copies`.
        """
        start, end = request.num_stored, request.num_stored + count
        for index, (group, table) in enumerate(zip(self.groups, request.tables)):
            if group.window is not None:
                table.evict_before(start - (group.window - 1))
            if _is_private(table, start, end):
                table.num_tokens = end
                continue
            try:
                allocate = group.allocate_or_grow if may_grow else group.blocks.allocate
                pairs = make_writable([table], [(start, end)], allocate)
            except OutOfBlocksError:
                return self._error(request, index)
            for source, destination in pairs:
                # The row that keeps the source may leave before it is copied, and another would write to it.
                group.blocks.hold(source)
                self.held[index].append(source)
                copies.append((index, (source, destination)))
        return None

    def _yield_blocks(
        self,
        request: Request,
        count: int,
        copies: list[_GroupCopy],
        step: SchedulerOutput,
        may_exceed_budget: bool,
    ) -> None:
        """Free blocks for `request`: preempt the row that came last, or let a row alone go past the budget."""
        # Alone, and still no room: caches outside the scheduler hold the blocks, or the pool is too small.
        error = self._shortage(request) if len(self.running) == 1 else None
        if error is None and (len(self.running) > 1 or not may_exceed_budget):
            self._withdraw(self.running[-1], step)
            self._preempt(self.running[-1])
            return
        error = error or self._make_room(request, count, copies, may_grow=True)
        if error is not None:
            self._fail(request, error, step)

    def _withdraw(self, request: Request, step: SchedulerOutput) -> None:
        """Take a row out of the step that is being chosen: one that waited may run beside later ones."""
        self.prefix.withdraw_moves(request)
        if all(chunk.request is not request for chunk in step.chunks):
            return
        step.chunks[:] = [chunk for chunk in step.chunks if chunk.request is not request]
        for copies, table in zip(step.copies, request.tables):
            copies[:] = [pair for pair in copies if pair[1] not in table.blocks]

    def _preempt(self, request: Request) -> None:
        """Free a running row's blocks and queue it where it was; it runs all its tokens again."""
        self._move(request, RequestState.WAITING)
        request.release()
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _fail(self, request: Request, error: OutOfBlocksError, step: SchedulerOutput) -> None:
        step.failed.append((request, error))
        self.prefix.withdraw_moves(request)
        self.remove(request)

    def _spare(self, index: int) -> int:
        """Blocks of a group that no running row has or will need until its next token is sampled."""
        pool = self.groups[index].blocks
        promised = sum(
            max(0, self._blocks(row, index, ahead=1) - len(row.tables[index].blocks)) for row in self.running
        )
        return pool.spare_blocks - promised

    def _blocks(self, request: Request, index: int, ahead: int = 0, stored: int = 0) -> int:
        """Blocks that the row holds at most until its next token is sampled, and `ahead` tokens more.

        `stored`: how many tokens it would find stored, if it does not run.
        """
        group, pool = self.groups[index], self.groups[index].blocks
        tokens = request.num_tokens + ahead
        if group.window is None:
            return row_blocks(tokens, pool.block_size, None)
        chunk = min(max(request.num_pending - stored, 1), self.token_budget)
        least, most = (row_blocks(tokens, pool.block_size, group.window, count) for count in (1, chunk))
        return max(least, min(most, pool.total_blocks))  # Where blocks are few, its chunks are shorter.

    def _error(self, request: Request, index: int) -> OutOfBlocksError:
        pool = self.groups[index].blocks
        free = pool.free_blocks + pool.cached_blocks + len(request.tables[index].blocks)
        return OutOfBlocksError(self._blocks(request, index), free, pool.total_blocks)

    def _shortage(self, request: Request) -> OutOfBlocksError | None:
        """The error of a row that needs more blocks than there are; None if it could fit alone."""
        errors = [self._error(request, index) for index in range(len(self.groups))]
        worst = max(errors, key=lambda error: error.needed - error.total)
        return worst if worst.needed > worst.total else None


def _order(request: Request) -> int:
    return request.order


def _is_private(table: BlockTable, start: int, end: int) -> bool:
    """Tell whether the row alone owns blocks for these tokens already, as for most tokens of a decode."""
    blocks, pool = table.blocks, table.pool
    last = (end - 1 - table.base) // pool.block_size
    if last >= len(blocks):
        return False
    first = (start - table.base) // pool.block_size
    for block in blocks[first : last + 1]:  # No generator: this runs for every row of every step.
        if pool.is_shared(block) or pool.is_kept(block):
            return False
    return True
