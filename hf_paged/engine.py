"""The engine: runs the rows of all calls on one model, a packed step at a time.

Whose thread does what: every call keeps to its caller's thread. One of the threads that have calls drives the
steps for all of them (schedule, pack, forward) until its own call is done, and then passes that on. The driver
samples for calls that run nothing but what transformers brings, so that their threads sleep until they are done;
any other call samples, streams and checks its criteria in its own thread, outside the engine's lock, and hands the
tokens back. One that is slow to do so misses steps; the others go on. No thread outlives its call. After a fork
the child has the parent's rows as they were, and none of its threads: make no fork while a call runs.
"""

import threading
import time

import torch
from transformers import PreTrainedModel

from .adopt import adopt
from .call import Call
from .fingerprint import fingerprint
from .kv_pool import GroupKey, KVPool
from .packed import pack, run_step
from .prepacked import linears_of
from .recipe import choose_together
from .request import Request
from .reservation import Patience, entered, is_inside
from .salt import current_salt
from .scheduler import Chunk, Schedule, Scheduler
from .seat import Seat, deliver
from .step_buffers import StepBuffers

_PATIENCE = 0.005  # Seconds until an engine without work looks again.
_GRACE = 0.25  # Share of a step's time that the next one waits for calls that are still sampling.


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
        self._buffers, self._patience = StepBuffers(self.keys[0].device), Patience(pool)
        self._lock = threading.RLock()
        self._handed_back = threading.Condition(self._lock)
        self._stepped = threading.Condition(self._lock)
        self._seats: dict[Request, Seat] = {}
        self._leaving: list[Call] = []
        self._linears_for = linears_of(pool.config)
        self._is_driven = False
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

    def tables_in(self, key: GroupKey):
        """Tables of the running rows in one attention group (for statistics and checks)."""
        number = self.keys.index(key) if key in self.keys else None
        return [] if number is None else [request.tables[number] for request in self.scheduler.running]

    def run(self, model: PreTrainedModel, call: Call) -> torch.Tensor:
        """Run a call to its end in this thread, together with the calls of other threads.

        Returns
        -------
        torch.Tensor
            As ``generate`` returns it.

        Raises
        ------
        OutOfBlocksError
            If the pool cannot hold some row; raised when the other rows are done.
        Exception
            What a processor, criterion, streamer or the model raises; the other calls go on.
        """
        seat = Seat(call, self._lock, is_inside(self.pool))
        config = self.pool.config
        identity = fingerprint(model, config.cache_salt, self.keys) if config.prefix_cache else None
        with self._lock, self.pool.lock:
            if identity is not None:
                self.scheduler.prefix.use(identity)
            for request in call.requests:
                # Tokens that a row brings along may have been stored in any way.
                request.salt = current_salt() if identity is not None and request.num_stored == 0 else None
                self._seats[request] = seat
            for request in call.leaders:
                self.scheduler.add(request)
        try:
            with entered(self.pool):
                while not call.is_done:
                    delivery = self._next_logits(model, seat)
                    if delivery is not None:
                        self._hand_back(seat, call.sample(*delivery))
                return call.close()
        finally:
            self._leave(call)

    def _next_logits(self, model, seat: Seat) -> tuple[list[Request], torch.Tensor] | None:
        """Logits for some of the call's rows, as soon as a step has them; None: look whether the call is done."""
        with self._lock:
            while True:
                if seat.error is not None:
                    try:
                        raise seat.error
                    finally:
                        seat.error = None  # Its traceback holds this seat: the cycle would keep blocks until gc.
                if seat.failed:
                    failed, seat.failed = seat.failed, []
                    for request, error in failed:
                        seat.call.fail(request, error)
                    return None
                if seat.logits and not (seat.call.is_quick and self._is_driven):
                    self._pass_on()
                    return seat.logits.popleft()
                if seat.call.is_cancelled and not self._is_driven:
                    seat.call.cancel()
                if seat.call.is_done:
                    return None
                if self._is_driven:
                    seat.is_asleep = True
                    seat.news.wait()
                    seat.is_asleep = False
                elif not self._wait_for_others():
                    self._is_driven = True
                    break
        try:
            self._step(model)
        finally:
            with self._lock:
                self._is_driven = False
                self._take_out(*self._leaving)
                self._leaving.clear()
                self._stepped.notify_all()
        return None

    def _pass_on(self) -> None:
        """Wake a call that drives on, now that this thread does not."""
        asleep = (seat for seat in self._seats.values() if seat.is_asleep)
        if not self._is_driven and (seat := next(asleep, None)) is not None:
            seat.news.notify()

    def _wait_for_others(self) -> bool:
        """Wait a moment for calls that are sampling, so that they do not miss the step; False: go on."""
        ended, took = self._last_step
        left = ended + _GRACE * took - time.monotonic()
        if left <= 0 or not any(seat.is_sampling for seat in set(self._seats.values())):
            return False
        self._handed_back.wait(left)
        return True

    def _hand_back(self, seat: Seat, sampled: list[tuple[Request, int | None]]) -> None:
        """Give sampled rows their tokens; the blocks of finished ones are free at once."""
        with self._lock, self.pool.lock:
            seat.is_sampling = bool(seat.logits)
            for request, token in sampled:
                if token is None:
                    self._take_out_row(request, seat.call)
                else:
                    request.tokens.append(token)
            self._handed_back.notify_all()

    def _leave(self, call: Call) -> None:
        """Take all that is left of a call out, however it ended."""
        with self._lock:
            if self._is_driven and any(request in self._seats for request in call.requests):
                # A step under way writes to its rows' blocks: its driver frees them when it is over.
                self._leaving.append(call)
                while call in self._leaving:
                    self._stepped.wait()
            else:
                self._take_out(call)
            self._pass_on()

    def _take_out(self, *calls: Call) -> None:
        with self.pool.lock:
            for call in calls:
                for request in call.requests:
                    self._take_out_row(request, call)
        self._handed_back.notify_all()

    def _take_out_row(self, request: Request, call: Call) -> None:
        """Take a row out, finished or not; a cache of its caller's gets what is stored of it."""
        if self._seats.pop(request, None) is not None:
            if call.cache is not None and call.is_done and request.num_stored:
                adopt(call.cache, request, self.pool, self.keys)
            self.scheduler.remove(request)

    def _step(self, model) -> None:
        """Run one step for every row that can run."""
        began = time.monotonic()
        with self._lock:
            with self.pool.lock:
                self.scheduler.is_closed = self.pool.num_waiting > 0
                # A call from inside another one cannot wait for it.
                is_awaited = any(seat.is_inside for seat in self._seats.values())
                self.scheduler.keeps_budget = self._patience.is_for_rectangles and not is_awaited
                schedule = self.scheduler.schedule()
                for group, copies in zip(self.scheduler.groups, schedule.copies):
                    # Before the lock is let go: a row that gave a source up may leave it to another cache.
                    group.copy_blocks(copies)
                    for storage in group.layers.values():
                        storage.ensure(group.blocks.high_water)
            for request, error in schedule.failed:
                self._seats[request].failed.append((request, error))
                self._seats[request].news.notify()
            if not schedule.chunks and not schedule.failed:
                # What does not fit waits for rows that other threads are sampling.
                self._handed_back.wait(_PATIENCE)
        if schedule.chunks:
            self._run(model, schedule)
            self._last_step = (time.monotonic(), time.monotonic() - began)
        with self._lock:
            for seat in set(self._seats.values()):
                if seat.call.is_cancelled and not seat.is_sampling:
                    seat.call.cancel()
                    seat.news.notify()

    def _run(self, model, schedule: Schedule) -> None:
        """Run scheduled chunks and deliver their logits, or an error to the call whose chunks raise it."""
        try:
            logits = self._forward(model, schedule)
        except Exception as error:
            parts = self._by_call(schedule)
            for seat, chunks in parts.items():
                if len(parts) == 1:
                    self._tell(seat, error)
                else:  # Which call it was shows when each is run by itself.
                    self._run(model, Schedule(chunks, [], []))
            return
        with self._lock, self.pool.lock:
            self.scheduler.done(schedule)
            seats = deliver(self._seats, self.scheduler, schedule, logits)
        for seat in seats:
            if not seat.call.is_quick:
                self._tell(seat)  # It begins meanwhile.
        self._sample_for([seat for seat in seats if seat.call.is_quick])

    def _tell(self, seat: Seat, error: BaseException | None = None) -> None:
        """Wake a call: there are logits for it, it is done, or it has failed."""
        with self._lock:
            seat.error = error or seat.error
            seat.news.notify()

    def _sample_for(self, seats: list[Seat]) -> None:
        """Sample for calls in the driver's thread."""
        chosen = choose_together([seat.call.recipe for seat in seats], [seat.logits[0][1] for seat in seats])
        for seat, tokens in zip(seats, chosen):
            try:
                self._hand_back(seat, seat.call.sample(*seat.logits.popleft(), tokens))
            except BaseException as error:
                self._tell(seat, error)
                if not isinstance(error, Exception):  # It was meant for the driver; the call cannot go on either.
                    raise
            if seat.call.is_done:
                self._tell(seat)

    def _by_call(self, schedule: Schedule) -> dict[Seat, list[Chunk]]:
        parts: dict[Seat, list[Chunk]] = {}
        with self._lock:
            for chunk in schedule.chunks:
                if (seat := self._seats.get(chunk.request)) is not None:
                    parts.setdefault(seat, []).append(chunk)
        return parts

    def _forward(self, model, schedule: Schedule) -> torch.Tensor:
        groups = self.scheduler.groups
        # Tensors made under one caller's inference_mode could not be changed by another's processors.
        with torch.inference_mode(False), torch.no_grad(), self._linears_for(model):
            windows = [group.window for group in groups]
            step = pack(schedule.chunks, windows, [group.layers for group in groups], self._buffers)
            logits = run_step(model, step)
        self.pool.page_reads += step.page_reads
        return logits
