"""The scheduler driven at random, compared with dictionaries: what rows hold, what slots hold, what can be found.

Its steps are made tensors as well, in buffers that know the tables of the step before, and compared with plain lists.
"""

import itertools
from types import SimpleNamespace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged.errors import OutOfBlocksError
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.execution.step_inputs import prepare_inputs
from hf_paged.generation.saved_prefix import HeldPrefix
from hf_paged.memory.eviction import LeastRecentlyUsed
from hf_paged.scheduling.cache_salt import cache_salt
from hf_paged.scheduling.request import Request, RequestState
from hf_paged.scheduling.scheduler import Scheduler, SchedulerOutput
from hf_paged.scheduling.swap_tier import SwapTier
from support.fake_groups import FakeGroup
from support.known_blocks import KnownBlocks
from support.policies import AnyBlock
from support.step_lists import assert_describes

between_steps = precondition(lambda self: self.step is None)
within_a_step = precondition(lambda self: self.step is not None)
picks = st.integers(0, 10**6)


class SchedulerAgainstDictionaries(RuleBasedStateMachine):
    """Prompts arrive, steps run, calls hand tokens back or leave, weights change, and others take blocks.

    Blocks that make room go to a swap space and come back, if there is one: while that pays, and until it fails.
    Prefixes are saved and loaded meanwhile.

    After some steps rows run ahead: with tokens that are read when the next step has run, or before it is planned.

    As in the engine, only steps exclude each other: all else may happen while one is under way. A token is
    written into a fake memory at its slot, with the weights and the salt that it was computed with; at the end of
    a step each row must find all that its queries see. No token is in two prompts unless all before it is, too;
    so a token says what its block is a function of.
    """

    @initialize(
        budgets=st.tuples(st.integers(1, 20), st.integers(1, 16)),
        slack=st.integers(0, 6),
        block_size=st.integers(1, 4),
        window=st.integers(1, 9),
        token_budget=st.integers(1, 12),
        row_budget=st.none() | st.integers(1, 6),
        cache_blocks=st.integers(0, 20),
        policy=st.sampled_from([LeastRecentlyUsed, AnyBlock]),
        swap_blocks=st.one_of(st.none(), st.tuples(st.integers(1, 12), st.integers(1, 12))),
    )
    def begin(self, budgets, slack, block_size, window, token_budget, row_budget, cache_blocks, policy, swap_blocks):
        self.groups = [
            FakeGroup(total, length, total + slack, block_size, policy(), layer)
            for layer, (total, length) in enumerate(zip(budgets, (None, window)))
        ]
        for group in self.groups:
            group.blocks.cache_blocks = cache_blocks
        self.buffers = StepBuffers(torch.device("cpu"))
        self.costs = SimpleNamespace(spilling_pays=True, restoring_pays=True)
        tier = None if swap_blocks is None else SwapTier(swap_blocks, self.costs)
        self.scheduler = Scheduler(self.groups, token_budget, None, tier, row_budget)
        self.engine = SimpleNamespace(
            scheduler=self.scheduler,
            block_pools=[group.blocks for group in self.groups],
            pool=SimpleNamespace(caches=set()),
            is_running=True,
        )
        self.tokens: dict[Request, list[int]] = {}  # Of every row, in order of arrival.
        self.prefixes: list[list[int]] = []  # Loaded ones.
        self.limits: dict[Request, int] = {}
        self.sampling: dict[Request, None] = {}
        self.unread: dict[Request, tuple[int, bool]] = {}  # A row's next token, and whether it ends with it.
        self.out: dict[Request, None] = {}
        self.held: list[dict[int, None]] = [{} for _ in self.groups]
        self.memory: list[dict[int, tuple]] = [{} for _ in self.groups]
        self.swap_space: list[dict[int, list]] = [{} for _ in self.groups]
        self.states: dict[Request, list[tuple]] = {}  # What each row has stored, by token.
        self.keeps_budget = False
        self.weights = 0
        self.born: dict[Request, int] = {}  # The weights that a row started with.
        self.known = KnownBlocks(self.groups, tier)
        self.moved = []
        self.step = None
        self.new_tokens = itertools.count()
        self.take, self.scheduler.prefix.take = self.scheduler.prefix.take, self.check_hit

    @property
    def live(self):
        return [request for request in self.tokens if request not in self.out]

    def waits(self, request):
        """Tell whether a row needs a token before it can run."""
        return request in self.sampling or (request in self.unread and not request.runs_ahead)

    def tokens_of(self, chunk):
        """The tokens of a chunk, with the one that only the device knows."""
        known = self.tokens[chunk.request][chunk.start : chunk.end]
        return [*known, self.unread[chunk.request][0]] if chunk.is_ahead else known

    @rule(
        pick=picks,
        shared=st.integers(0, 20),
        length=st.integers(1, 24),
        more=st.integers(1, 12),
        duplicates=st.integers(0, 3),
        salt=st.sampled_from(["", "", "salt", None]),
    )
    def arrive(self, pick, shared, length, more, duplicates, salt):
        earlier = [*self.tokens.values(), *self.prefixes]
        prompt = earlier[pick % len(earlier)][: min(shared, length)] if earlier else []
        prompt += [next(self.new_tokens) for _ in range(length - len(prompt))]
        rows = [Request(list(prompt), [group.blocks for group in self.groups]) for _ in range(1 + duplicates)]
        rows[0].duplicates = rows[1:]
        for row in rows:
            self.tokens[row], self.limits[row], row.salt = list(prompt), length + more, salt
        self.scheduler.add(rows[0])

    @rule(pick=picks, shared=st.integers(0, 20), lengths=st.lists(st.integers(4, 24), min_size=2, max_size=6))
    def crowd_in(self, pick, shared, lengths):
        """Several rows arrive, some of which begin like earlier ones; more than there are blocks for."""
        for place, length in enumerate(lengths):
            self.arrive(pick + place, shared, length, 4, 0, "")

    @rule(identity=st.sampled_from([b"weights", b"other weights"]))
    def call(self, identity):
        """A call finds the model as it is now."""
        if identity != self.scheduler.prefix._identity:
            self.weights += 1
            self.known.clear()
            self.moved = []
        self.scheduler.prefix.use(identity)

    def check_hit(self, request, hit):
        """A row starts: it must find what the dictionaries say, no more and no less."""
        tokens = self.tokens[request]
        assert hit.num_blocks == self.known.longest(request, tokens)
        self.take(request, hit)
        if request.num_stored != hit.num_blocks * self.known.size:  # Too few blocks to restore into.
            assert request.num_stored == self.known.longest(request, tokens, False) * self.known.size
        self.born[request] = self.weights
        self.states[request] = [(self.weights, request.salt, token) for token in tokens[: request.num_stored]]

    @rule(pick=picks, shared=st.integers(0, 20), num_blocks=st.integers(1, 6), salt=st.sampled_from(["", "salt"]))
    def save_or_load(self, pick, shared, num_blocks, salt):
        """A prefix is saved if it is stored; if not, it comes from a file."""
        earlier, length = [*self.tokens.values(), *self.prefixes], num_blocks * self.known.size
        tokens = earlier[pick % len(earlier)][: min(shared, length)] if earlier else []
        tokens += [next(self.new_tokens) for _ in range(length - len(tokens))]
        with cache_salt(salt):
            held = HeldPrefix(self.engine, tokens)
        states = [(self.weights, salt, token) for token in tokens]
        try:
            if held.find(self.scheduler.prefix._identity):
                assert self.known.has_prefix(held.request, tokens)
                for table, memory in zip(held.request.tables, self.memory):
                    assert [memory[slot] for slot in table.slots(table.base, length)] == states[table.base :]
                return
            assert not self.known.has_prefix(held.request, tokens)
            spare = [group.blocks.spare_blocks for group in self.groups]
            evictions = [group.blocks.num_evictions for group in self.groups]
            try:
                held.allocate()
            except OutOfBlocksError:
                assert spare == [group.blocks.spare_blocks for group in self.groups]
                assert evictions == [group.blocks.num_evictions for group in self.groups]
                return
            for table, memory in zip(held.request.tables, self.memory):
                memory.update(zip(table.slots(table.base, length), states[table.base :]))
            self.known.learn(held.request, tokens, 0, length)
            self.prefixes.append(tokens)
            held.insert(self.scheduler.prefix._identity)
        finally:
            held.release()

    @rule(keeps_budget=st.booleans())
    def expect_blocks(self, keeps_budget):
        """Another call will give its blocks back soon, or will not."""
        self.keeps_budget = keeps_budget

    @rule(spilling=st.booleans(), restoring=st.booleans())
    def measure(self, spilling, restoring):
        """Moving blocks pays, or does not."""
        self.costs.spilling_pays, self.costs.restoring_pays = spilling, restoring

    @between_steps
    @rule()
    def schedule(self):
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        ahead = [row for row in running if row.runs_ahead]
        totals = [group.blocks.total_blocks for group in self.groups]
        step = self.step = self.scheduler.schedule(may_exceed_budget=not self.keeps_budget)
        for request, error in step.failed:
            self.check_failure(request, error, totals)
            assert request not in ahead, "a row that may have ended fails"
            self.out.update(dict.fromkeys([request, *request.duplicates]))
        self.moved = self.known.moved(step)
        self.check_chunks(step)
        if step.chunks:
            assert_describes(prepare_inputs(step.chunks, self.groups, self.buffers), step.chunks, self.groups)
        self.check_queues(running, waiting)
        if all(row in ahead or self.waits(row) for row in running):
            assert all(row.state is RequestState.RUNNING for row in running), "a row that may have ended takes blocks"
        for number in range(len(self.groups)):
            self.check_moves(number)
            self.check_copies(number, step.copies[number])
        ready = [row for row in (*running, *waiting) if not self.waits(row)]
        is_free = not any(row in self.sampling or row in self.unread for row in running)
        if self.keeps_budget:
            assert totals == [group.blocks.total_blocks for group in self.groups], "a pool grew that need not"
            is_free = is_free and not any(self.held)
        assert step.chunks or step.failed or not (ready and is_free), "rows are ready and none of them gets on"

    def check_failure(self, request, error, totals):
        # A pool may have grown for another row of the step.
        assert any(old <= error.total <= group.blocks.total_blocks for old, group in zip(totals, self.groups))
        assert error.needed <= -(-len(self.tokens[request]) // self.groups[0].blocks.block_size)
        # What the pool could hold fails for want of memory only: a cache outside has it.
        assert error.needed > error.total or (error.needed > error.free and any(self.held))

    def check_chunks(self, step):
        rows = [chunk.request for chunk in step.chunks]
        arrivals = {row: number for number, row in enumerate(self.tokens)}
        assert rows == sorted(set(rows), key=arrivals.get)
        assert sum(chunk.end - chunk.start for chunk in step.chunks) <= self.scheduler.token_budget
        assert len(step.chunks) <= self.scheduler.row_budget
        assert not any(map(self.waits, rows)) and set(rows) <= set(self.scheduler.running)
        for chunk in step.chunks:
            length = len(self.tokens[chunk.request]) + chunk.request.runs_ahead
            assert chunk.request.num_stored == chunk.start < chunk.end <= length
            assert chunk.samples == (chunk.end == length) and len(chunk.tokens) == chunk.end - chunk.start
            assert not chunk.is_ahead or chunk.tokens == [0]
        for number, group in enumerate(self.groups):
            slots = [s for chunk in step.chunks for s in chunk.request.tables[number].slots(chunk.start, chunk.end)]
            assert len(set(slots)) == len(slots), "two tokens go to one slot"
            assert not any(group.blocks.is_shared(slot // group.blocks.block_size) for slot in slots)

    def check_queues(self, running, waiting):
        arrivals = {row: number for number, row in enumerate(self.tokens)}
        preempted = [row for row in running if row.state is RequestState.WAITING]
        admitted = [row for row in waiting if row.state is RequestState.RUNNING]
        assert not (preempted and admitted)
        # A row that waits for a block that is computed in this step may be overtaken by the others of the step.
        stays = [row for row in self.scheduler.waiting if not self.waits(row) and not self.finds_more(row)]
        assert not (stays and admitted) or max(map(arrivals.get, admitted)) < arrivals[stays[0]], "a row is overtaken"
        last = max((arrivals[row] for row in self.scheduler.running), default=-1)
        assert all(arrivals[row] > last for row in preempted), "not the last one was preempted"

    def finds_more(self, request):
        """Tell whether the step computes or moves a block that the row could find."""
        computed = set()
        for chunk in self.step.chunks:
            if self.born[chunk.request] == self.weights:
                tokens = self.tokens[chunk.request]
                computed.update(self.known.keys(chunk.request, tokens, chunk.start, min(chunk.end, len(tokens))))
        for spilled, restored in self.moved:
            computed.update(spilled.values(), restored.values())
        tokens = self.tokens[request]
        return not computed.isdisjoint(self.known.keys(request, tokens, 0, len(tokens) - 1))

    def check_copies(self, number, copies):
        sources, destinations = [source for source, _ in copies], [destination for _, destination in copies]
        assert len(set(destinations)) == len(copies) and not set(sources) & set(destinations)
        owned = {block for chunk in self.step.chunks for block in chunk.request.tables[number].blocks}
        assert set(destinations) <= owned

    def check_moves(self, number):
        spills, restores = self.step.spills[number], self.step.restores[number]
        owned = {block for chunk in self.step.chunks for block in chunk.request.tables[number].blocks}
        assert {block for block, _ in spills} <= owned, "a block that others may take is spilled"
        new = [block for _, block in restores]
        assert set(new) <= owned and len(set(new)) == len(new)
        assert not any(self.groups[number].blocks.is_shared(block) for block in new)
        places = [*(swap_block for _, swap_block in spills), *(swap_block for swap_block, _ in restores)]
        assert len(set(places)) == len(places), "a swap block is in two moves"

    def make_ready(self, number):
        """Spill, restore and copy blocks, in this order."""
        size, memory, swap_space = self.known.size, self.memory[number], self.swap_space[number]
        for block, swap_block in self.step.spills[number]:
            swap_space[swap_block] = [memory.get(block * size + offset) for offset in range(size)]
        for swap_block, block in self.step.restores[number]:
            memory.update({block * size + offset: state for offset, state in enumerate(swap_space[swap_block])})
        for source, destination in self.step.copies[number]:
            for offset in range(size):
                memory[destination * size + offset] = memory.get(source * size + offset)

    @within_a_step
    @rule()
    def lose_swap_space(self):
        """The swap space fails: rows give up that were to get blocks from there, and the others go on."""
        step = self.step
        lost = [chunk for chunk in step.chunks if self.scheduler.prefix.is_restoring(chunk.request)]
        self.scheduler.lose(SchedulerOutput(lost, step.copies, []))
        self.scheduler.prefix.stop_swapping()
        self.known.tier, self.moved = None, []
        for known in self.known.swapped:
            known.clear()
        chunks = [chunk for chunk in step.chunks if chunk not in lost]
        self.step = SchedulerOutput(chunks, step.copies, [], [[] for _ in self.groups], [[] for _ in self.groups])
        self.end_step(False, set())

    @within_a_step
    @rule(is_left_unread=st.booleans(), ends=st.sets(st.integers(0, 20)))
    def end_step(self, is_left_unread, ends):
        for number in range(len(self.groups)):
            self.make_ready(number)
        step, self.step = self.step, None
        for chunk in step.chunks:
            states, tokens = self.states[chunk.request], self.tokens_of(chunk)
            assert len(states) == chunk.start
            states += [(self.weights, chunk.request.salt, token) for token in tokens]
        for number, (group, memory) in enumerate(zip(self.groups, self.memory)):
            for chunk in step.chunks:
                slots = chunk.request.tables[number].slots(chunk.start, chunk.end)
                memory.update(zip(slots, self.states[chunk.request][chunk.start : chunk.end]))
            for chunk in step.chunks:
                seen = 0 if group.window is None else max(0, chunk.start - group.window + 1)
                found = [memory[slot] for slot in chunk.request.tables[number].slots(seen, chunk.end)]
                assert found == self.states[chunk.request][seen : chunk.end]
        self.read()
        owned = [{b for row in self.scheduler.running for b in row.tables[n].blocks} for n in range(len(self.groups))]
        self.known.learn_moved(self.moved, owned)
        for chunk in step.chunks:
            if self.born[chunk.request] == self.weights and chunk.request not in self.out:
                self.known.learn(chunk.request, self.tokens[chunk.request], chunk.start, chunk.end)
        self.scheduler.commit(step)
        for chunk in step.chunks:
            if chunk.samples and chunk.request not in self.out:
                duplicates = [row for row in chunk.request.duplicates if row not in self.out]
                self.scheduler.start_duplicates(chunk.request)
                self.born.update(dict.fromkeys(duplicates, self.born[chunk.request]))
                self.states.update({row: list(self.states[chunk.request]) for row in duplicates})
                self.sampling.update(dict.fromkeys([chunk.request, *duplicates]))
        if is_left_unread:
            self.run_ahead(ends)

    def run_ahead(self, ends):
        """Rows that are being sampled go on without their tokens; those that will be full wait."""
        for place, request in enumerate(self.sampling):
            length = len(self.tokens[request]) + 1
            self.unread[request] = next(self.new_tokens), place in ends or length >= self.limits[request]
            request.runs_ahead = length < self.limits[request] and request.state is RequestState.RUNNING
        self.sampling.clear()

    @between_steps
    @rule()
    def read(self):
        """The tokens of the last step are known."""
        unread, self.unread = self.unread, {}
        for request, (token, is_over) in unread.items():
            if is_over:
                self.take_out(request)
            else:
                request.add_token(token)
                self.tokens[request].append(token)

    @within_a_step
    @rule()
    def abort_step(self):
        """The step is interrupted before it has copied anything."""
        step, self.step = self.step, None
        self.scheduler.abort(step)
        for number, copies in enumerate(step.copies):
            for _, destination in copies:  # What was copied is lost; no row may read it.
                assert not any(destination in row.tables[number].blocks for row in self.tokens)

    @precondition(lambda self: self.sampling)
    @rule(pick=picks, is_over=st.booleans())
    def hand_back(self, pick, is_over):
        """A row's next token is sampled, or it is finished."""
        request = list(self.sampling)[pick % len(self.sampling)]
        del self.sampling[request]
        if is_over or len(self.tokens[request]) >= self.limits[request]:
            self.take_out(request)
        else:
            token = next(self.new_tokens)
            request.tokens.append(token)
            self.tokens[request].append(token)

    @rule()
    def hand_all_back(self):
        while self.sampling:
            self.hand_back(0, False)

    @between_steps
    @rule(count=st.integers(2, 12))
    def go_on(self, count):
        """Steps follow each other: blocks make room."""
        for _ in range(count):
            self.schedule()
            self.end_step(False, set())
            self.hand_all_back()
            self.pools_are_whole()
            self.what_can_be_found_is_there()

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def cancel(self, pick):
        """A row leaves, whatever it is about; only one whose chunk is under way must wait."""
        request = self.live[pick % len(self.live)]
        if self.step is None or all(chunk.request is not request for chunk in self.step.chunks):
            self.take_out(request)

    def take_out(self, request):
        self.scheduler.remove(request)
        for row in (request, *request.duplicates):
            self.out[row] = None
            self.sampling.pop(row, None)
            self.unread.pop(row, None)

    @rule(number=st.integers(0, 1), count=st.integers(1, 8))
    def hold(self, number, count):
        """A cache outside the scheduler takes blocks and writes to them."""
        blocks = self.groups[number].blocks
        try:
            taken = blocks.allocate(count)
        except OutOfBlocksError:
            return
        self.held[number].update(dict.fromkeys(taken))
        size = blocks.block_size
        self.memory[number].update({block * size + at: "another's" for block in taken for at in range(size)})

    @rule(number=st.integers(0, 1), num_left=st.integers(0, 8))
    def vacate(self, number, num_left):
        """The memory of free blocks goes back to the system, even in the middle of a step."""
        blocks = self.groups[number].blocks
        for block in blocks.vacate(num_left):
            for offset in range(blocks.block_size):
                self.memory[number].pop(block * blocks.block_size + offset, None)

    @precondition(lambda self: any(self.held))
    @rule(number=st.integers(0, 1), at_once=st.booleans())
    def let_go(self, number, at_once):
        blocks, self.held[number] = list(self.held[number]), {}
        if at_once:
            self.groups[number].blocks.free(blocks)
        else:
            self.groups[number].blocks.give_back(blocks)

    @invariant()
    def a_row_is_in_one_place(self):
        duplicates = [row for first in self.live for row in first.duplicates if row not in self.out]
        queues = {
            RequestState.NEW: duplicates,
            RequestState.WAITING: self.scheduler.waiting,
            RequestState.RUNNING: self.scheduler.running,
        }
        queues[RequestState.OUT] = list(self.out)
        arrivals = {row: number for number, row in enumerate(self.tokens)}
        for state in (RequestState.WAITING, RequestState.RUNNING):
            assert queues[state] == sorted(queues[state], key=arrivals.get)
        assert sorted(arrivals[row] for queue in queues.values() for row in queue) == list(range(len(arrivals)))
        for state, queue in queues.items():
            assert all(row.state is state for row in queue)
            assert state is RequestState.RUNNING or not any(table.blocks for row in queue for table in row.tables)
        assert all(row.tokens == tokens for row, tokens in self.tokens.items())

    @invariant()
    def pools_are_whole(self):
        for number, group in enumerate(self.groups):
            blocks = group.blocks
            sources = self.scheduler.held[number]
            assert sorted(sources) == sorted(source for source, _ in (self.step.copies[number] if self.step else []))
            owned = [row.tables[number].blocks for row in self.tokens]
            blocks.check_integrity([*owned, list(self.held[number]), sources])
            assert blocks.free_blocks + blocks.cached_blocks + blocks.used_blocks == blocks.total_blocks

    @invariant()
    def what_can_be_found_is_there(self):
        self.scheduler.prefix.check_integrity()
        for group, known in zip(self.groups, self.known.blocks):
            kept = filter(group.blocks.is_kept, range(group.blocks.high_water))
            assert sorted(known.values()) == list(kept)
        if (tier := self.scheduler.prefix.tier) is not None:
            for pool, known in zip(tier.pools, self.known.swapped):
                assert sorted(known.values()) == list(filter(pool.is_kept, range(pool.high_water)))
                assert self.step is not None or not pool.used_blocks, "a swap block is in use and none moves"

    def teardown(self):
        """Whatever happened, every row gets to its end, even if no blocks are given back."""
        if not hasattr(self, "scheduler"):
            return
        self.keeps_budget = False
        longest = sum(self.limits.values()) + 1
        for number in range(longest * (1 + len(self.live))):
            if not self.live:
                break
            if number % 16 == 15:
                self.call([b"weights", b"other weights"][number // 16 % 2])
            if self.step is None:
                self.schedule()
            self.end_step(False, set())
            self.hand_all_back()
            self.what_can_be_found_is_there()
        assert not self.live, "steps go on without end"
        self.pools_are_whole()
        for group, held in zip(self.groups, self.held):
            assert group.blocks.used_blocks == len(held)


TestSchedulerAgainstDictionaries = SchedulerAgainstDictionaries.TestCase
TestSchedulerAgainstDictionaries.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
