"""The engine: runs the rows of all calls on one model, a packed step at a time.

Which thread does what: every call keeps to its caller's thread. One of the calls drives the steps for all of them,
until it is done, and passes that on. A turn of the driver is a forward between two atomic sections (`atomic.py`):

1. in a section: the scheduler plans a step;
2. in the driver's thread: copy shared blocks, pack, forward, choose tokens for the calls that run nothing but what
   transformers brings, so that their threads sleep until they are done;
3. in a section, with the next plan: the step is noted, these calls accept their tokens.

Any other call chooses, streams and checks its criteria in its own thread and hands the tokens back. One that is slow
to do so misses steps; the others go on.

Nothing but sections changes the state of the engine, so an interrupt of the driver at any place costs its own call
only: the step under way is as if it had not begun. No thread outlives its call, but for the one that runs sections.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from hf_paged.atomic import Undo, atomically, is_in_section
from hf_paged.errors import OutOfBlocksError, UnsupportedError
from hf_paged.execution.packed_cache import pack, run_step
from hf_paged.execution.prepacked_linear import linears_of
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.generation.cache_handoff import hand_over
from hf_paged.generation.generate_call import Choice, GenerateCall
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.memory.reservation import StallDetector, entered, is_inside
from hf_paged.models.fingerprint import Identity, identify
from hf_paged.sampling.sampler import sample_together
from hf_paged.scheduling.cache_salt import current_salt
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk, Scheduler, SchedulerOutput

Result = TypeVar("Result")
_PATIENCE = 0.005  # Seconds until a driver without work looks again.
_GRACE = 0.25  # Share of a step's time that the next one waits for calls that are still sampling.


class CallState:
    """A call in the engine. Read and written in sections; its thread sleeps on `mail`.

    Parameters
    ----------
    call : GenerateCall
    is_inside : bool
        Whether a callback of another call on the pool made this one, and waits for it.
    """

    def __init__(self, call: GenerateCall, is_inside: bool):
        self.call, self.is_inside, self.thread = call, is_inside, threading.get_ident()
        self.mail: SimpleQueue = SimpleQueue()  # Wakes the call: what is in it means nothing.
        self._has_left: SimpleQueue = SimpleQueue()
        self.is_asleep = False
        self.logits: deque[tuple[list[Request], torch.Tensor]] = deque()  # For a call that is not quick.
        self.failed: list[tuple[Request, OutOfBlocksError]] = []
        self.error: BaseException | None = None
        self.is_sampling = False  # In the call's own thread; the next step may wait for it.

    def wake(self) -> None:
        if self.is_asleep:
            self.is_asleep = False
            self.mail.put(None)

    def sleep(self, seconds: float | None) -> None:
        try:
            self.mail.get(timeout=seconds)
        except Empty:
            pass

    def tell_left(self) -> None:
        """Note that the engine has nothing of the call any more."""
        self._has_left.put(None)

    def wait_until_left(self) -> None:
        """Wait for `tell_left`: a step under way writes to the blocks of its rows."""
        self._has_left.get()


@dataclass(frozen=True)
class Sleep:
    """An order to a call: wait for news, `seconds` at most."""

    seconds: float | None


@dataclass(frozen=True)
class Sample:
    """An order to a call: choose and accept the next tokens of these rows, from ``[rows, vocab]``."""

    requests: list[Request]
    logits: torch.Tensor


@dataclass(frozen=True)
class Drive:
    """An order to a call: run this step.

    Attributes
    ----------
    schedule : SchedulerOutput
    seats : dict of Request to CallState
        Of the rows that run, and of their followers.
    began : float
        When it was planned.
    must_check : bool
        Whether a call has found the model at its entry since the last look at it.
    """

    schedule: SchedulerOutput
    seats: dict[Request, CallState]
    began: float
    must_check: bool


@dataclass
class Delivery:
    """Logits of a step that are for one call: ``[len(requests), vocab]``, and what was chosen from them."""

    seat: CallState
    requests: list[Request]
    logits: torch.Tensor
    choice: Choice | None = None


@dataclass
class Report:
    """How a step went.

    Attributes
    ----------
    chunks : list of Chunk
        Those that have run.
    errors : list of (CallState, Exception)
        Calls that cannot go on.
    is_same_model : bool
        Whether the model is the one that the prefix cache serves.
    """

    began: float
    chunks: list[Chunk] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    errors: list[tuple[CallState, Exception]] = field(default_factory=list)
    is_same_model: bool = True


@dataclass(frozen=True)
class Sampled:
    """The next tokens of some rows of a call, None for one that is finished."""

    tokens: list[tuple[Request, int | None]]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Call a function, and once more if it raises: its result, or its error.

    Raises
    ------
    Exception
        An error that does not come again. It is not the function's: a signal handler, such as a time limit, raised
        it in this thread.
    """
    try:
        return function(), None
    except Exception as error:
        first = error
    try:
        result = function()
        if not _is_of_memory(first):
            raise first
    except Exception as error:
        if error is first:
            raise
        return None, error
    finally:
        del first  # Its traceback holds this frame: no cycle.
    return result, None


def _is_of_memory(error: Exception) -> bool:
    """Tell whether an error may go away by itself: there was no memory, and now there is."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def _choose_alone(delivery: Delivery, report: Report) -> Exception | None:
    """Choose tokens for one call; the error that it raises, if it does, is noted."""
    choose = functools.partial(delivery.seat.call.choose, delivery.requests, delivery.logits)
    delivery.choice, error = _attempt(choose)
    if error is not None:
        report.errors.append((delivery.seat, error))
    return error


class Engine:
    """Calls on one pool share its scheduler, its blocks and their forwards.

    Parameters
    ----------
    pool : KVPool
        Knows every attention group already.
    """

    def __init__(self, pool: KVPool):
        self.pool = pool
        self.keys = list(pool.groups)
        self.scheduler = Scheduler(list(pool.groups.values()), pool.config.token_budget)
        self.scheduler.prefix.counts = pool.prefix_counts
        self._buffers, self._patience = StepBuffers(self.keys[0].device), StallDetector(pool)
        self._linears_for = linears_of(pool.config)
        self._identity: Identity | None = None  # Of the model that the prefix cache serves, while rows run.
        self._is_checked = True  # Whether a step is planned that looks whether the model is still as a call found it.
        self._seats: dict[Request, CallState] = {}
        self._leaving: list[CallState] = []
        self._driver: CallState | None = None
        self._under_way: SchedulerOutput | None = None
        self._last_step = (0.0, 0.0)  # When the last step ended, and how long it took.
        pool.caches.add(self)
        pool.engines.add(self)

    @property
    def block_pools(self):
        """The block pool of each attention group, in the order of a request's tables."""
        return [group.blocks for group in self.scheduler.groups]

    @property
    def is_running(self) -> bool:
        """Whether there are rows of calls under way."""
        return bool(self._seats)

    @property
    def _is_driven(self) -> bool:
        """Tell whether a call drives the steps."""
        return self._driver is not None

    def tables_in(self, key: KVCacheSpec) -> list[BlockTable]:
        """Tables that own blocks of one attention group (for statistics and checks)."""
        if key not in self.keys:
            return []
        number = self.keys.index(key)
        held = BlockTable(self.block_pools[number])
        held.blocks = list(self.scheduler.held[number])
        return [held, *(request.tables[number] for request in self.scheduler.running)]

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
        seat = CallState(call, is_inside(self.pool))
        undo = Undo(functools.partial(self._drop, seat))
        try:
            with entered(self.pool):
                self._enter(model, seat)
                return self._take_part(model, seat)
        finally:
            undo.now()
            seat.wait_until_left()

    def _enter(self, model: PreTrainedModel, seat: CallState) -> None:
        config, call, salt = self.pool.config, seat.call, current_salt()
        identity = self._identity
        if config.prefix_cache and (identity is None or not identity.is_found_again()):
            identity = identify(model, config.cache_salt, self.keys)

        def enter() -> None:
            if identity is not None:
                self.scheduler.prefix.use(identity.digest)
                self._identity, self._is_checked = identity, False
            for request in call.requests:
                # Tokens that a row brings along may have been stored in any way.
                request.salt = salt if identity is not None and request.num_stored == 0 else None
                self._seats[request] = seat
            for request in call.leaders:
                self.scheduler.add(request)

        self._change(enter)

    def _change(self, section):
        """Run an atomic section under the pool's lock."""

        def locked():
            with self.pool.lock:
                return section()

        return atomically(locked)

    # What a call does in its own thread.

    def _take_part(self, model: PreTrainedModel, seat: CallState) -> torch.Tensor:
        """Follow orders until the call is done."""
        done: Report | Sampled | None = None
        while True:
            order = self._change(functools.partial(self._next_order, seat, done))
            done = None
            match order:
                case None:
                    return seat.call.close()
                case Sleep():
                    seat.sleep(order.seconds)
                case Sample():
                    choice = seat.call.choose(order.requests, order.logits)
                    done = Sampled(seat.call.accept(order.requests, choice))
                case Drive():
                    done = self._run_step(model, seat, order)
                case BaseException():
                    try:
                        raise order
                    finally:
                        del order  # Its traceback holds this frame: no cycle.

    def _run_step(self, model: PreTrainedModel, driver: CallState, order: Drive) -> Report:
        """Run the chunks of all calls. What one of them raises is its own; what none of them raises is the driver's."""
        report = Report(order.began)
        chunks = self._prepare(order, report)
        is_same_model = not order.must_check or self._is_same_model()
        for part, logits in self._forward_all(model, driver, order, chunks, report):
            report.chunks += part
            report.deliveries += self._deliveries(order, part, logits)
        report.chunks.sort(key=lambda chunk: chunk.request.order)
        self._choose_for([delivery for delivery in report.deliveries if delivery.seat.call.is_quick], report)
        report.is_same_model = is_same_model and self._is_same_model()
        return report

    def _is_same_model(self) -> bool:
        """Tell whether the model is still the one that the prefix cache serves, if it serves any."""
        identity = self._identity
        return identity is None or not self.scheduler.prefix.is_in_use or identity.holds()

    def _prepare(self, order: Drive, report: Report) -> list[Chunk]:
        """Make the step's blocks addressable and copy the shared ones; the chunks whose blocks are ready."""
        lost: dict[Chunk, Exception] = {}
        for number, (group, copies) in enumerate(zip(self.scheduler.groups, order.schedule.copies)):
            with self.pool.lock:
                _, error = _attempt(functools.partial(group.copy_blocks, copies) if copies else group.ensure)
            if error is not None:
                ready = min(storage.num_blocks for storage in group.layers.values())
                destinations = {destination for _, destination in copies}
                for chunk in order.schedule.chunks:
                    blocks = chunk.request.tables[number].blocks
                    if not destinations.isdisjoint(blocks) or max(blocks, default=0) >= ready:
                        lost[chunk] = error
        report.errors += [(order.seats[chunk.request], error) for chunk, error in lost.items()]
        failed = {seat for seat, _ in report.errors}
        return [chunk for chunk in order.schedule.chunks if order.seats[chunk.request] not in failed]

    def _forward_all(self, model, driver: CallState, order: Drive, chunks: list[Chunk], report: Report):
        """Logits of the chunks, all in one forward or, if that fails, call by call: (chunks, logits) pairs."""
        if not chunks:
            return []
        try:
            return [(chunks, self._forward(model, chunks))]
        except Exception as error:
            first = error
        try:
            parts: dict[CallState, list[Chunk]] = {}
            for chunk in chunks:
                parts.setdefault(order.seats[chunk.request], []).append(chunk)
            if list(parts) == [driver]:
                raise first
            done, failed = [], []
            for seat, part in parts.items():
                try:
                    done.append((part, self._forward(model, part)))
                except Exception as error:
                    failed.append((seat, error))
            if not failed and not _is_of_memory(first):
                raise first  # It is no call's: a signal handler raised it, in this thread.
            report.errors += failed
            return done
        finally:
            del first  # Its traceback holds this frame: no cycle.

    def _forward(self, model, chunks: list[Chunk]) -> torch.Tensor:
        groups = self.scheduler.groups
        # Tensors made under one caller's inference_mode could not be changed by another's processors.
        with torch.inference_mode(False), torch.no_grad(), self._linears_for(model):
            windows = [group.window for group in groups]
            step = pack(chunks, windows, [group.layers for group in groups], self._buffers)
            logits = run_step(model, step)
        self.pool.page_reads += step.page_reads
        return logits

    @staticmethod
    def _deliveries(order: Drive, chunks: Sequence[Chunk], logits: torch.Tensor) -> list[Delivery]:
        """Logits ``[samples, vocab]`` by call. Followers of a row whose prompt is stored now start from its logits."""
        places: dict[CallState, dict[Request, int]] = {}
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        for place, request in enumerate(sampled):
            rows = [request, *(row for row in request.followers if row in order.seats)]
            places.setdefault(order.seats[request], {}).update(dict.fromkeys(rows, place))
        deliveries = []
        for seat, place_of in places.items():
            requests = seat.call.by_place(place_of)
            at = [place_of[request] for request in requests]
            is_slice = at == list(range(at[0], at[0] + len(at)))
            deliveries.append(Delivery(seat, requests, logits[at[0] : at[0] + len(at)] if is_slice else logits[at]))
        return deliveries

    @staticmethod
    def _choose_for(deliveries: list[Delivery], report: Report) -> None:
        """Choose tokens for quick calls, those that choose alike together."""
        samplers = [delivery.seat.call.sampler for delivery in deliveries]
        chosen = sample_together(samplers, [delivery.logits for delivery in deliveries])
        left = [(delivery, tokens) for delivery, tokens in zip(deliveries, chosen) if tokens is None]
        joint: dict[int, list[tuple[Delivery, Exception]]] = {}
        for delivery, tokens in zip(deliveries, chosen):
            if isinstance(tokens, Exception):
                joint.setdefault(id(tokens), []).append((delivery, tokens))
            elif tokens is not None:
                delivery.choice = Choice(tokens)
        for failed in joint.values():
            errors = [_choose_alone(delivery, report) for delivery, _ in failed]
            if all(error is None for error in errors) and not _is_of_memory(failed[0][1]):
                raise failed[0][1]  # It is no call's: a signal handler raised it, in this thread.
        for delivery, _ in left:
            _choose_alone(delivery, report)

    # What happens in sections, under the pool's lock.

    def _next_order(self, seat: CallState, done: Report | Sampled | None):
        """Note what a call has done; what it does next: an order, an error to raise, or None if it is done."""
        if isinstance(done, Report):
            self._finish_step(done)
        elif isinstance(done, Sampled):
            self._hand_back(seat, done)
        if seat.error is None and seat.failed:
            for request, error in seat.failed:
                seat.call.fail(request, error)
            seat.failed.clear()
        if seat.error is not None:
            error, seat.error = seat.error, None  # Its traceback may hold this seat: the cycle would keep blocks.
            self._pass_on(seat)
            return error
        if seat.logits:
            self._pass_on(seat)
            return Sample(*seat.logits.popleft())
        if seat.call.is_cancelled and not self._is_in_step(seat):
            self._cancel(seat)
        if seat.call.is_done:
            self._pass_on(seat)
            return None
        if self._driver not in (None, seat):
            seat.is_asleep = True
            return Sleep(None)
        self._driver = seat
        return self._order_to_drive(seat)

    def _order_to_drive(self, seat: CallState):
        seconds = self._wait_for_others()
        order = self._plan() if seconds <= 0 else None
        if order is None:
            if seat.failed:
                return self._next_order(seat, None)
            # What does not fit waits for rows that other threads are sampling.
            seat.is_asleep = True
            order = Sleep(seconds if seconds > 0 else _PATIENCE)
        return order

    def _wait_for_others(self) -> float:
        """Seconds that calls which are sampling may still take, so that they do not miss the step."""
        ended, took = self._last_step
        left = ended + _GRACE * took - time.monotonic()
        return left if left > 0 and any(seat.is_sampling for seat in set(self._seats.values())) else 0.0

    def _plan(self) -> Drive | None:
        began = time.monotonic()
        self._cancel_calls()
        self.scheduler.is_closed = self.pool.num_waiting > 0
        # A call from inside another one cannot wait for it.
        is_awaited = any(seat.is_inside for seat in self._seats.values())
        self.scheduler.keeps_budget = self._patience.is_for_reserved_calls and not is_awaited
        schedule = self.scheduler.schedule()
        for request, error in schedule.failed:
            self._seats[request].failed.append((request, error))
            self._seats[request].wake()
        if not schedule.chunks:
            return None
        self._under_way = schedule
        must_check, self._is_checked = not self._is_checked, True
        rows = [row for chunk in schedule.chunks for row in (chunk.request, *chunk.request.followers)]
        seats = {row: self._seats[row] for row in rows if row in self._seats}
        return Drive(schedule, seats, began, must_check)

    def _is_in_step(self, seat: CallState) -> bool:
        """Tell whether a row of the call runs in the step under way, which writes to its blocks."""
        step = self._under_way
        return step is not None and any(self._seats.get(chunk.request) is seat for chunk in step.chunks)

    def _finish_step(self, report: Report) -> None:
        schedule, self._under_way = self._under_way, None
        if not report.is_same_model:
            self.scheduler.prefix.suspend()
        self.scheduler.done(SchedulerOutput(report.chunks, schedule.copies, []))
        for seat, error in report.errors:
            self._fail(seat, error)
        for delivery in report.deliveries:
            if delivery.seat.error is None and delivery.seat not in self._leaving:
                self._deliver(delivery)
        self._take_out_leaving()
        self._last_step = (time.monotonic(), time.monotonic() - report.began)
        self._cancel_calls()

    def _deliver(self, delivery: Delivery) -> None:
        seat = delivery.seat
        for request in delivery.requests:
            self.scheduler.follow(request)
        if delivery.choice is None:
            seat.logits.append((delivery.requests, delivery.logits))
            seat.is_sampling = True
            seat.wake()  # It begins meanwhile.
            return
        try:
            self._note(seat, seat.call.accept(delivery.requests, delivery.choice))
        except BaseException as error:  # Of its streamer.
            self._fail(seat, error)
        if seat.call.is_done:
            seat.wake()

    def _note(self, seat: CallState, tokens: list[tuple[Request, int | None]]) -> None:
        """Give sampled rows their tokens; the blocks of finished ones are free at once."""
        for request, token in tokens:
            if token is None:
                self._take_out_row(request, seat.call)
            else:
                request.tokens.append(token)

    def _hand_back(self, seat: CallState, sampled: Sampled) -> None:
        seat.is_sampling = bool(seat.logits)
        self._note(seat, sampled.tokens)
        if self._is_driven:
            self._driver.wake()

    def _fail(self, seat: CallState, error: BaseException) -> None:
        """End a call by an error. Its rows are out at once: what their blocks hold may be wrong."""
        seat.error = error
        self._take_out_rows(seat)
        seat.wake()

    def _cancel_calls(self) -> None:
        for seat in set(self._seats.values()):
            if seat.call.is_cancelled and not seat.is_sampling:
                self._cancel(seat)

    def _cancel(self, seat: CallState) -> None:
        """End a call with the tokens that it has."""
        seat.call.cancel()
        self._take_out_rows(seat)
        seat.wake()

    def _pass_on(self, seat: CallState) -> None:
        """Let another call drive, if it was this one that did."""
        if self._driver is seat:
            self._driver = None
        if not self._is_driven:
            asleep = (other for other in self._seats.values() if other.is_asleep)
            if (other := next(asleep, None)) is not None:
                other.wake()

    def _drop(self, seat: CallState) -> None:
        """Take all that is left of a call out, however it ended. Idempotent."""
        with self.pool.lock:
            if self._driver is seat and self._under_way is not None:
                schedule, self._under_way = self._under_way, None
                self.scheduler.abort(schedule)
                self._is_checked = False
                self._take_out_leaving()
            if self._is_in_step(seat):
                self._leaving.append(seat)  # The driver takes it out when the step is over.
            else:
                self._take_out(seat)
            self._pass_on(seat)

    def _take_out_leaving(self) -> None:
        leaving, self._leaving = self._leaving, []
        for seat in leaving:
            self._take_out(seat)

    def _take_out(self, seat: CallState) -> None:
        self._take_out_rows(seat)
        seat.tell_left()
        if self._is_driven:
            self._driver.wake()

    def _take_out_rows(self, seat: CallState) -> None:
        for request in seat.call.requests:
            self._take_out_row(request, seat.call)

    def _take_out_row(self, request: Request, call: GenerateCall) -> None:
        """Take a row out, finished or not; a cache of its caller's gets what is stored of it."""
        if self._seats.pop(request, None) is not None:
            if call.cache is not None and call.is_done and request.num_stored:
                hand_over(call.cache, request, self.pool, self.keys)
            self.scheduler.remove(request)
        if not self._seats:
            self._identity = None  # It keeps what it has seen alive, old weights too.

    def forget_other_threads(self) -> None:
        """Drop the calls of all threads but this one: in a forked child they are gone."""
        here = threading.get_ident()
        for seat in [self._driver, *self._seats.values()]:
            if seat is not None and seat.thread != here:
                self._drop(seat)
        if self._under_way is None:
            self._take_out_leaving()
