"""The engine: runs the rows of all calls on one model, a packed step at a time.

A step is one forward over chunks of many rows, as the scheduler planned it. A call keeps to its caller's thread: it
asks the engine for an order, carries it out, and comes back with a report. One of the calls is the driver: the order
that it gets is to run the next step, for all calls, until it is done itself; then it passes that on. A turn of the
driver is a forward between two atomic sections (`atomic.py`):

1. in a section: the scheduler plans a step;
2. in the driver's thread: the runner makes the blocks ready and runs the forward, and tokens are chosen for the calls
   that run nothing but what transformers brings, so that their threads sleep until they are done;
3. in a section, with the next plan: the step is noted, these calls accept their tokens.

Where the device is asynchronous, steps run one ahead: the tokens of a step stay unread, the next one is planned and
launched with them on the device, and only then the driver waits for them. So a turn is: plan N + 1; launch it, read
the tokens of N; note that N + 1 runs, accept the tokens of N. A row that has ended with its token of N has one chunk
too many in N + 1: that is dropped, and counts as never stored. A step is left unread if all calls that get tokens from
it can do without them (`GenerateCall.can_run_ahead`); else it is read at once, and the turn is as above.

Any other call chooses, streams and checks its criteria in its own thread and hands the tokens back. One that is slow
to do so misses steps; the others go on.

Nothing but sections changes the state of the engine, so an interrupt of the driver at any place costs its own call
only: the step under way is as if it had not begun, and the unread one before it is read by the next driver. No thread
outlives its call, but for the one that runs sections.

An error belongs to the call whose work raises it, in whichever thread. To tell it from what a signal handler raises
in the driver's thread, the work is done once more: an error that does not come again is no call's, and reaches the
caller whose thread it is. A fault of the device is the error of every call in the step, and nothing is done again.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_paged.atomic import Undo, atomically, is_in_section
from hf_paged.errors import UnsupportedError
from hf_paged.execution.attempt import attempt
from hf_paged.execution.captured_steps import CapturedRunner
from hf_paged.execution.model_runner import make_runner, register_runner
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.generation.cache_handoff import hand_over
from hf_paged.generation.call_state import (
    CallState,
    Delivery,
    Drive,
    Finish,
    Order,
    Raise,
    Report,
    Sample,
    SampleReport,
    Sleep,
    StepReport,
    Unread,
)
from hf_paged.generation.generate_call import Choice, GenerateCall, read_choices
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.memory.reservation import entered, is_inside
from hf_paged.memory.sizing import Workspace, step_limits, step_tokens
from hf_paged.memory.stall_detector import StallDetector
from hf_paged.memory.swap_costs import SwapCosts
from hf_paged.memory.swap_space import SwapSpace, make_swap_space
from hf_paged.models.fingerprint import Identity, identify
from hf_paged.sampling.next_tokens import NextTokens
from hf_paged.sampling.sampler import sample_together
from hf_paged.scheduling.cache_salt import current_salt
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk, Scheduler, SchedulerOutput
from hf_paged.scheduling.swap_tier import SwapTier
from hf_paged_kernels.faults import is_device_fault, is_out_of_memory

logger = logging.get_logger(__name__)
Result = TypeVar("Result")
_IDLE_SECONDS = 0.005  # Until a driver without work looks for some again.
_SAMPLING_GRACE = 0.25  # Share of a step's time that the next step waits for calls that still sample from it.

register_runner(CapturedRunner)


class Engine:
    """Calls on one pool share its scheduler, its blocks and their forwards.

    Parameters
    ----------
    pool : KVPool
        Knows every KV cache group of the model already.

    Attributes
    ----------
    specs : list of KVCacheSpec
        Of the KV cache groups, in the order of a request's tables.
    scheduler : Scheduler
    runner : ModelRunner
    """

    def __init__(self, pool: KVPool):
        self.pool = pool
        self.specs = list(pool.groups)
        tokens = step_tokens(pool.config, self.specs[0].device)
        self._swap_space = make_swap_space(pool)
        tier = None if self._swap_space is None else _tier_of(self._swap_space, pool)
        self.scheduler = Scheduler(list(pool.groups.values()), tokens, pool.prefix_counts, tier)
        self.runner = make_runner(pool)
        self._stall_detector = StallDetector(pool)
        self._identity: Identity | None = None  # Of the model that the prefix cache serves, while rows run.
        self._must_check = False  # Whether the next step looks if the model is still as the calls found it.
        self._state_of: dict[Request, CallState] = {}  # Of every row that is in.
        self._driver: CallState | None = None
        self._under_way: SchedulerOutput | None = None  # The step that the driver runs.
        self._unread: Unread | None = None  # The step before it, if its tokens are not known yet.
        self._unread_tokens = 0  # That this step has run.
        self._leaving: list[CallState] = []  # Calls that have ended while their rows are in that step.
        self._last_step = (0.0, 0.0)  # When the last step ended, and how long it took, in seconds.
        pool.caches.add(self)
        pool.engines.add(self)

    @property
    def block_pools(self) -> list[BlockPool]:
        """The block pool of each KV cache group, in the order of a request's tables."""
        return [group.blocks for group in self.scheduler.groups]

    @property
    def token_budget(self) -> int:
        """Tokens that one step runs at most."""
        return self.scheduler.token_budget

    def make_room(self, workspace: Workspace) -> None:
        """Let steps and blocks share the budget, as long as the model's layers are on the CPU.

        Parameters
        ----------
        workspace : Workspace
            What the steps of the model take beside the blocks.
        """

        def shrink() -> None:
            groups = self.pool.groups.values()
            if any(group.spec.device.type != "cpu" for group in groups):
                return
            limits = step_limits(self.pool.config.token_budget, min(group.budget for group in groups), workspace)
            self.scheduler.token_budget, self.scheduler.row_budget = limits.tokens, limits.rows
            for group in groups:
                group.make_room(workspace, limits)

        self._change(shrink)

    @property
    def is_running(self) -> bool:
        """Tell whether rows of calls are under way."""
        return bool(self._state_of)

    @property
    def num_preemptions(self) -> int:
        """Times that a row gave its blocks up to rows that came earlier."""
        return self.scheduler.num_preemptions

    @property
    def captured_buckets(self) -> tuple[int, ...]:
        """Sizes in rows of the decode steps that are captured now."""
        return self.runner.captured_buckets

    @property
    def swapped_bytes(self) -> int:
        """Bytes of the blocks that are in the swap space."""
        tier, space = self.scheduler.prefix.tier, self._swap_space
        if tier is None or space is None:
            return 0
        return sum(pool.cached_blocks * size for pool, size in zip(tier.pools, space.block_bytes))

    @property
    def _is_driven(self) -> bool:
        """Tell whether a call drives the steps."""
        return self._driver is not None

    def tables_in(self, spec: KVCacheSpec) -> list[BlockTable]:
        """Tables that own blocks of one KV cache group (for statistics and checks)."""
        if spec not in self.specs:
            return []
        number = self.specs.index(spec)
        held = BlockTable(self.block_pools[number])
        held.blocks = list(self.scheduler.held[number])
        return [held, *(request.tables[number] for request in self.scheduler.running)]

    def identify(self, model: PreTrainedModel) -> Identity | None:
        """Inspect the model, with all else that what is stored on this engine depends on.

        Returns
        -------
        Identity or None
            None if a change of the model could not be seen: nothing is found or stored then.
        """
        return identify(model, self.pool.config.cache_salt, self.specs)

    def run(self, model: PreTrainedModel, call: GenerateCall) -> torch.Tensor:
        """Run a call to its end in this thread, together with the calls of other threads.

        Returns
        -------
        torch.Tensor
            As ``generate`` returns it.

        Raises
        ------
        OutOfBlocksError
            If the pool cannot hold some row; raised when the other rows are done.
        UnsupportedError
            If a `RowStreamer` calls ``generate`` while it is told of tokens.
        Exception
            What a processor, criterion, streamer or the model raises; the other calls go on.
        """
        if is_in_section():
            raise UnsupportedError(
                "generate was called by a streamer that is being told of tokens, and all calls wait for it: "
                "hand the tokens to another thread and call generate there"
            )
        state = CallState(call, is_inside(self.pool))
        undo = Undo(functools.partial(self._drop, state))
        try:
            with entered(self.pool):
                self._enter(model, state)
                return self._take_part(model, state)
        finally:
            undo.now()
            state.wait_until_left()

    def _enter(self, model: PreTrainedModel, state: CallState) -> None:
        """Queue the rows of a call."""
        config, call, salt = self.pool.config, state.call, current_salt()
        identity = self._identity
        if not self.is_running:
            self.runner.begin()
        is_needed = config.prefix_cache or self.runner.needs_identity
        if is_needed and (identity is None or not identity.is_found_again()):
            identity = self.identify(model)
        has_prefixes = config.prefix_cache and identity is not None

        def enter() -> None:
            if identity is not None:
                self._identity, self._must_check = identity, True
                if has_prefixes:
                    self.scheduler.prefix.use(identity.digest)
            for request in call.requests:
                # Tokens that a row brings along may have been stored in any way.
                request.salt = salt if has_prefixes and request.num_stored == 0 else None
                self._state_of[request] = state
            for request in call.distinct_requests:
                self.scheduler.add(request)

        self._change(enter)

    def _change(self, section: Callable[[], Result]) -> Result:
        """Run an atomic section under the pool's lock."""

        def locked() -> Result:
            with self.pool.lock:
                return section()

        return atomically(locked)

    # What a call does in its own thread.

    def _take_part(self, model: PreTrainedModel, state: CallState) -> torch.Tensor:
        """Carry out orders until the call is done."""
        report: Report | None = None
        while True:
            order = self._change(functools.partial(self._next_order, state, report))
            report = None
            match order:
                case Finish():
                    return state.call.close()
                case Raise():
                    try:
                        raise order.error
                    finally:
                        del order  # The error's traceback holds this frame: no cycle.
                case Sleep():
                    state.sleep(order.seconds)
                case Sample():
                    choice = state.call.choose(order.requests, order.logits)
                    report = SampleReport(state.call.accept(order.requests, choice))
                case Drive():
                    report = self._run_step(model, state, order)

    def _run_step(self, model: PreTrainedModel, driver: CallState, order: Drive) -> StepReport:
        """Run the chunks of all calls. What one of them raises is its own; what none of them raises is the driver's."""
        report = StepReport(order.began)
        chunks = self._make_ready(order, report)
        is_same_model = not order.must_check or self._is_same_model()
        for part, logits in self._forward_all(model, driver, order, chunks, report):
            report.chunks += part
            report.deliveries += self._deliveries(order, part, logits)
        report.chunks.sort(key=lambda chunk: chunk.request.order)
        self._choose_for([delivery for delivery in report.deliveries if delivery.state.call.is_quick], report)
        self._leave_failed_out(order, report)
        report.is_same_model = is_same_model and self._is_same_model()
        self._read_tokens(order, report)
        return report

    def _is_same_model(self) -> bool:
        """Tell whether the model is still the one that the prefix cache serves, if it serves any."""
        identity = self._identity
        return identity is None or not self.scheduler.prefix.is_in_use or identity.holds()

    def _make_ready(self, order: Drive, report: StepReport) -> list[Chunk]:
        """Make the step's blocks ready. Returns its chunks, without those whose blocks are not, and their calls'."""
        self._move(order, report)
        lost: dict[Chunk, Exception] = {}
        for number, copies in enumerate(order.planned.copies):
            _, error = attempt(functools.partial(self.runner.make_ready, number, copies))
            if error is not None:
                destinations = {destination for _, destination in copies}
                for chunk in order.planned.chunks:
                    if not destinations.isdisjoint(chunk.request.tables[number].blocks):
                        lost[chunk] = error
        unrestored = set(report.lost)
        report.lost += [chunk for chunk in lost if chunk.is_ahead and chunk not in unrestored]
        report.errors += [(order.states[chunk.request], error) for chunk, error in lost.items() if not chunk.is_ahead]
        failed = {state for state, _ in report.errors}
        whole = [chunk for chunk in order.planned.chunks if chunk not in lost and chunk not in unrestored]
        return [chunk for chunk in whole if order.states[chunk.request] not in failed]

    def _move(self, order: Drive, report: StepReport) -> None:
        """Move blocks to the swap space and back. Where that fails it is the end of the space, and of no call."""
        spills, restores = order.planned.spills, order.planned.restores
        if self._swap_space is None or not (any(spills) or any(restores)):
            return
        moved, error = attempt(functools.partial(self._swap_space.move, spills, restores))
        error = moved.error if moved is not None else error
        if error is None:
            report.moved = moved
            return
        logger.warning_once(
            f"hf_paged: the swap space is out of use from now on ({type(error).__name__}: {error}); blocks that make "
            "room are computed again. Set a smaller swap_space, or TMPDIR to a folder with room for it."
        )
        report.has_swap_space = False
        for chunk in order.planned.chunks:
            for moves, table in zip(restores, chunk.request.tables):
                if any(block in table.blocks for _, block in moves):
                    report.lost.append(chunk)
                    break

    def _forward_all(
        self, model: PreTrainedModel, driver: CallState, order: Drive, chunks: list[Chunk], report: StepReport
    ) -> list[tuple[list[Chunk], torch.Tensor]]:
        """Logits of the chunks, all in one forward or, if that fails, call by call: (chunks, logits) pairs."""
        if not chunks:
            return []
        try:
            return [(chunks, self._forward(model, order, chunks))]
        except Exception as error:
            first = error
        try:
            parts: dict[CallState, list[Chunk]] = {}
            for chunk in chunks:
                parts.setdefault(order.states[chunk.request], []).append(chunk)
            if list(parts) == [driver] and not _is_ahead(chunks):
                raise first
            if is_device_fault(first):
                report.errors += [(state, first) for state in parts]
                return []
            done = []
            for state, part in parts.items():
                try:
                    done.append((part, self._forward(model, order, part)))
                except Exception as error:
                    if not _is_ahead(part):
                        report.errors.append((state, error))
            if len(done) == len(parts) and not is_out_of_memory(first):
                raise first  # It is no call's: a signal handler raised it, in this thread.
            return done
        finally:
            del first  # Its traceback holds this frame: no cycle.

    def _forward(self, model: PreTrainedModel, order: Drive, chunks: list[Chunk]) -> torch.Tensor:
        pending = None if order.unread is None else order.unread.pending
        logits = self.runner.run(model, chunks, pending, self._identity, order.others_draw)
        self.pool.page_reads += sum(len(group.layers) for group in self.runner.groups)
        return logits

    @staticmethod
    def _deliveries(order: Drive, chunks: Sequence[Chunk], logits: torch.Tensor) -> list[Delivery]:
        """Logits ``[samples, vocab]`` by call. Duplicates of a row whose prompt is stored now start from its logits."""
        places: dict[CallState, dict[Request, int]] = {}
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        for place, request in enumerate(sampled):
            rows = [request, *(row for row in request.duplicates if row in order.states)]
            places.setdefault(order.states[request], {}).update(dict.fromkeys(rows, place))
        deliveries = []
        for state, place_of in places.items():
            requests = state.call.by_place(place_of)
            at = [place_of[request] for request in requests]
            is_slice = at == list(range(at[0], at[0] + len(at)))
            deliveries.append(Delivery(state, requests, logits[at[0] : at[0] + len(at)] if is_slice else logits[at]))
        return deliveries

    @staticmethod
    def _choose_for(deliveries: list[Delivery], report: StepReport) -> None:
        """Choose tokens for quick calls, those that choose alike together."""
        samplers = [delivery.state.call.sampler for delivery in deliveries]
        noises = [functools.partial(delivery.state.call.noise, delivery.requests) for delivery in deliveries]
        chosen = sample_together(samplers, [delivery.logits for delivery in deliveries], noises)
        alone: list[Delivery] = []
        failed_together: dict[int, tuple[Exception, list[Delivery]]] = {}  # By the error's identity.
        for delivery, tokens in zip(deliveries, chosen):
            if isinstance(tokens, Exception):
                failed_together.setdefault(id(tokens), (tokens, []))[1].append(delivery)
            elif tokens is None:
                alone.append(delivery)
            else:
                delivery.choice = Choice(tokens)
        for error, failed in failed_together.values():
            if is_device_fault(error):
                report.errors += [(delivery.state, error) for delivery in failed]
                continue
            are_right = [_choose_alone(delivery, report) for delivery in failed]
            if all(are_right) and not is_out_of_memory(error):
                raise error  # It is no call's: a signal handler raised it, in this thread.
        for delivery in alone:
            _choose_alone(delivery, report)

    @staticmethod
    def _leave_failed_out(order: Drive, report: StepReport) -> None:
        """Take calls whose tokens could not be chosen out of the step. One with rows ahead tries again without."""
        failed = {state for state, _ in report.errors}
        tries_again = failed & {order.states[chunk.request] for chunk in report.chunks if chunk.is_ahead}
        report.deliveries = [delivery for delivery in report.deliveries if delivery.state not in failed]
        report.chunks = [chunk for chunk in report.chunks if order.states[chunk.request] not in tries_again]
        report.errors = [(state, error) for state, error in report.errors if state not in tries_again]

    def _read_tokens(self, order: Drive, report: StepReport) -> None:
        """Read the tokens of the step before; and those of this one, unless the next can run with them unread."""
        stays_unread = (
            self.runner.is_asynchronous
            and bool(report.deliveries)
            and all(delivery.state.call.can_run_ahead for delivery in report.deliveries)
        )
        if stays_unread:  # The copy to the host begins before the host waits for the one before.
            report.unread, report.deliveries = self._unread_of(report.deliveries), []
        if order.unread is not None:
            report.tokens_before = order.unread.pending.read()
        _read_choices(report.deliveries)

    def _unread_of(self, deliveries: Sequence[Delivery]) -> Unread:
        """Start the copy of the chosen tokens to the host."""
        rows = [(delivery.state, delivery.requests) for delivery in deliveries]
        choices = [delivery.choice for delivery in deliveries if delivery.choice is not None]
        with torch.inference_mode(False), torch.no_grad():
            tokens = NextTokens.joined([choice.tokens for choice in choices], self.specs[0].device)
            requests = [request for _, some in rows for request in some]
            return Unread(PendingTokens(tokens.ids, tokens.marked(), requests), rows)

    # What happens in sections, under the pool's lock.

    def _next_order(self, state: CallState, report: Report | None) -> Order:
        """Note what a call has done, and tell it what to do next."""
        if isinstance(report, StepReport):
            self._finish_step(report)
        elif isinstance(report, SampleReport):
            self._hand_back(state, report)
        if state.error is None and state.failed:
            for request, error in state.failed:
                state.call.fail(request, error)
            state.failed.clear()
        if state.error is not None:
            order = Raise(state.error)
            state.error = None  # Its traceback may hold this state: the cycle would keep blocks.
            self._pass_on(state)
            return order
        if state.logits:
            self._pass_on(state)
            return Sample(*state.logits.popleft())
        if state.call.is_cancelled and not self._is_in_step(state):
            self._cancel(state)
        if state.call.is_done:
            self._pass_on(state)
            return Finish()
        if self._driver not in (None, state):
            state.is_asleep = True
            return Sleep(None)
        self._driver = state
        return self._order_to_drive(state)

    def _order_to_drive(self, state: CallState) -> Order:
        """Plan the driver's next step. Without work it sleeps a little: others sample, or have yet to free blocks."""
        seconds = self._wait_for_others()
        step = self._plan() if seconds <= 0 else None
        if step is not None:
            return step
        if state.failed:
            return self._next_order(state, None)
        state.is_asleep = True
        return Sleep(seconds if seconds > 0 else _IDLE_SECONDS)

    def _wait_for_others(self) -> float:
        """Seconds that calls which are sampling may still take, so that they do not miss the step."""
        ended, took = self._last_step
        left = ended + _SAMPLING_GRACE * took - time.monotonic()
        return left if left > 0 and any(state.is_sampling for state in set(self._state_of.values())) else 0.0

    def _plan(self) -> Drive | None:
        """Plan a step; None if no row can run."""
        began = time.monotonic()
        self._cancel_calls()
        # A call from inside another one cannot wait for it.
        is_awaited = any(state.is_inside for state in self._state_of.values())
        planned = self.scheduler.schedule(
            admits_waiting=not self.pool.num_waiting,
            may_exceed_budget=not self._stall_detector.expects_blocks() or is_awaited,
        )
        for request, error in planned.failed:
            self._state_of[request].failed.append((request, error))
            self._state_of[request].wake()
        if not planned.chunks and self._unread is None:
            return None
        self._under_way = planned
        must_check, self._must_check = self._must_check, False
        rows = [row for chunk in planned.chunks for row in (chunk.request, *chunk.request.duplicates)]
        states = {row: self._state_of[row] for row in rows if row in self._state_of}
        others_draw = any(state.is_sampling for state in self._state_of.values())
        return Drive(planned, states, began, must_check, self._unread, others_draw)

    def _is_in_step(self, state: CallState) -> bool:
        """Tell whether a row of the call runs in the step under way, which writes to its blocks."""
        step = self._under_way
        return step is not None and any(self._state_of.get(chunk.request) is state for chunk in step.chunks)

    def _finish_step(self, report: StepReport) -> None:
        """Note that the step under way has run, and first how the one before it ended."""
        planned, self._under_way = self._under_way, None
        before, self._unread = self._unread, None
        assert planned is not None, "a report of a step that is not under way"
        for choice in [] if before is None else before.choices(report.tokens_before):
            self._accept(*choice)
        if not report.is_same_model:
            self.scheduler.prefix.suspend()
        self.scheduler.lose(SchedulerOutput(report.lost, planned.copies, []))
        self._note_moves(report)
        self.scheduler.commit(SchedulerOutput(report.chunks, planned.copies, []))
        for state, error in report.errors:
            self._fail(state, error)
        for chunk in report.chunks:
            if chunk.request in self._state_of and chunk.samples:
                self.scheduler.start_duplicates(chunk.request)
        for delivery in report.deliveries:
            self._deliver(delivery)
        if report.unread is not None:
            self._run_ahead(report.unread)
        self._take_out_leaving()
        self._last_step = (time.monotonic(), time.monotonic() - report.began)
        self._cancel_calls()

    def _note_moves(self, report: StepReport) -> None:
        """Note what moving blocks and running tokens has cost; or that there is no swap space any more."""
        if not report.has_swap_space:
            self.scheduler.prefix.stop_swapping()
            self._swap_space = None
        tier = self.scheduler.prefix.tier
        if tier is None:
            return
        seconds = time.monotonic() - report.began
        if report.moved is not None:
            seconds -= tier.costs.note_move(report.moved)
        # The tokens of steps for which the host has waited since this one was planned.
        count, self._unread_tokens = self._unread_tokens, sum(chunk.end - chunk.start for chunk in report.chunks)
        if report.unread is None:
            count, self._unread_tokens = count + self._unread_tokens, 0
        tier.costs.note_step(count, seconds)

    def _run_ahead(self, unread: Unread) -> None:
        """Leave a step unread: its rows go on without their tokens, but for those that end by their length."""
        rows = [(state.call, request) for state, some in unread.rows for request in some if request in self._state_of]
        self._unread = unread if rows else None
        for call, request in rows:
            request.runs_ahead = call.may_go_on(request)

    def _deliver(self, delivery: Delivery) -> None:
        """Give a call the logits of its rows, or the tokens that were chosen from them."""
        state = delivery.state
        if delivery.choice is not None:
            self._accept(state, delivery.requests, delivery.choice)
        elif state.error is None and state not in self._leaving:
            state.logits.append((delivery.requests, delivery.logits))
            state.is_sampling = True
            state.wake()  # It begins meanwhile.

    def _accept(self, state: CallState, requests: list[Request], choice: Choice) -> None:
        """Let a call accept the tokens that were chosen for it, but those of rows that have ended a step ago."""
        places = [place for place, request in enumerate(requests) if request in self._state_of]
        if state.error is not None or state in self._leaving or not places:
            return
        if len(places) < len(requests):
            requests, choice = [requests[place] for place in places], choice.of(places)
        try:
            self._note(state, state.call.accept(requests, choice))
        except BaseException as error:  # Of its streamer.
            self._fail(state, error)
        if state.call.is_done:
            state.wake()

    def _note(self, state: CallState, tokens: list[tuple[Request, int | None]]) -> None:
        """Give sampled rows their tokens; the blocks of finished ones are free at once."""
        for request, token in tokens:
            if token is None:
                self._take_out_row(request, state.call)
            else:
                request.add_token(token)

    def _hand_back(self, state: CallState, report: SampleReport) -> None:
        """Take the tokens that a call has sampled in its own thread."""
        state.is_sampling = bool(state.logits)
        self._note(state, report.tokens)
        self._wake_driver()

    def _fail(self, state: CallState, error: BaseException) -> None:
        """End a call by an error. Its rows are out at once: what their blocks hold may be wrong."""
        state.error = error
        self._take_out_rows(state)
        state.wake()

    def _cancel_calls(self) -> None:
        for state in set(self._state_of.values()):
            if state.call.is_cancelled and not state.is_sampling:
                self._cancel(state)

    def _cancel(self, state: CallState) -> None:
        """End a call with the tokens that it has."""
        state.call.cancel()
        self._take_out_rows(state)
        state.wake()

    def _pass_on(self, state: CallState) -> None:
        """Let another call drive, if it was this one that did."""
        if self._driver is state:
            self._driver = None
        if not self._is_driven:
            asleep = (other for other in self._state_of.values() if other.is_asleep)
            if (other := next(asleep, None)) is not None:
                other.wake()

    def _wake_driver(self) -> None:
        if self._driver is not None:
            self._driver.wake()

    def _drop(self, state: CallState) -> None:
        """Take all that is left of a call out, however it ended. Idempotent."""
        with self.pool.lock:
            if self._driver is state and self._under_way is not None:
                planned, self._under_way = self._under_way, None
                self.scheduler.abort(planned)
                self._must_check = True
                self._take_out_leaving()
            if self._is_in_step(state):
                self._leaving.append(state)  # The driver takes it out when the step is over.
            else:
                self._take_out(state)
            self._pass_on(state)

    def _take_out_leaving(self) -> None:
        leaving, self._leaving = self._leaving, []
        for state in leaving:
            self._take_out(state)

    def _take_out(self, state: CallState) -> None:
        self._take_out_rows(state)
        state.tell_left()
        self._wake_driver()

    def _take_out_rows(self, state: CallState) -> None:
        for request in state.call.requests:
            self._take_out_row(request, state.call)

    def _take_out_row(self, request: Request, call: GenerateCall) -> None:
        """Take a row out, finished or not; a cache of its caller's gets what is stored of it."""
        if self._state_of.pop(request, None) is not None:
            if call.cache is not None and call.is_done and request.num_stored:
                hand_over(call.cache, request, self.pool, self.specs)
            self.scheduler.remove(request)
        if not self._state_of:
            self._identity = None  # It keeps what it has seen alive, old weights too.
            self._unread = None

    def forget_other_threads(self) -> None:
        """Drop the calls of all threads but this one, and the swap space: in a forked child they are the parent's."""
        here = threading.get_ident()
        for state in [self._driver, *self._state_of.values()]:
            if state is not None and state.thread != here:
                self._drop(state)
        if self._under_way is None:
            self._take_out_leaving()
        if self._swap_space is not None:
            self._swap_space.renew()
        if self.scheduler.prefix.tier is not None:
            self.scheduler.prefix.tier.drop()


def _tier_of(space: SwapSpace, pool: KVPool) -> SwapTier:
    """The swap blocks of an empty swap space."""
    costs = SwapCosts(sum(space.block_bytes), pool.config.block_size)
    return SwapTier([space.num_blocks] * len(space.block_bytes), costs, pool.swap_counts)


def _is_ahead(chunks: Sequence[Chunk]) -> bool:
    """Tell whether a row runs with a token that is not known: it may have ended, and run what it never would."""
    return any(chunk.is_ahead for chunk in chunks)


def _choose_alone(delivery: Delivery, report: StepReport) -> bool:
    """Choose tokens for one call. Returns whether it could; if not, its error is noted."""
    choose = functools.partial(delivery.state.call.choose, delivery.requests, delivery.logits)
    delivery.choice, error = attempt(choose)
    if error is not None:
        report.errors.append((delivery.state, error))
    return error is None


def _read_choices(deliveries: list[Delivery]) -> None:
    """Bring the chosen tokens of all calls to the host at once."""
    chosen = [delivery for delivery in deliveries if delivery.choice is not None]
    choices = [delivery.choice for delivery in chosen if delivery.choice is not None]
    for delivery, choice in zip(chosen, read_choices(choices)):
        delivery.choice = choice
