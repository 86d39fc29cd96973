"""Prefetch: a function over the items of an iterator, many at a time in threads, results in order.

The iterator itself is read in the consumer's thread, as a plain loop would. Only an iterable that may keep one waiting
(a generator over a queue) is read in a thread of its own, and only while the consumer waits here: a result that is
ready does not wait for the next item to arrive.
"""

import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from hf_paged.sampling.cancellation import Cancellation
from hf_paged_integrations.pipelines.reader import Reader

_READ_AHEAD = 2  # Items read and not yet returned, at most, as a multiple of those that run.


@dataclass
class _Item:
    """An item and its run. A stopped one has not begun: its future and cancellation are new."""

    value: Any
    future: Future = field(default_factory=Future)
    cancellation: Cancellation = field(default_factory=Cancellation)
    is_stopped: bool = False

    @property
    def is_running(self) -> bool:
        """Tell whether its thread has been started and has set no result yet."""
        return not self.is_stopped and not self.future.done()


class Prefetch:
    """Results of ``function(item, cancellation)`` in the order of the items, many of which run at a time.

    An error, of the function or of the source, is raised in its item's place; what runs ahead is stopped then, and
    starts anew when the next result is asked for. An iterator that is dropped stops what runs ahead.

    Parameters
    ----------
    function : callable
        Runs in threads. Returns soon after its cancellation is set; its result counts for nothing then.
    source : iterator
        Items, read in the consumer's thread.
    reader : Reader or None
        What the source reads from, if that may keep it waiting.
    batch_size : int
        Items of `reader` that make one item of the source.
    window : int
        Items that run at the same time.
    wakeup : threading.Condition
        The reader's.
    """

    def __init__(
        self,
        function: Callable[[Any, Cancellation], Any],
        source: Iterator,
        reader: Reader | None,
        batch_size: int,
        window: int,
        wakeup: threading.Condition,
    ):
        self._function, self._source, self._reader = function, source, reader
        self._batch_size, self._window, self._wakeup = batch_size, window, wakeup
        self._items: deque[_Item] = deque()
        self._is_over = False
        weakref.finalize(self, _abandon, self._items, reader)

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        try:
            while True:
                self._restart_stopped()
                self._start_next()
                if self._is_first_done():
                    return self._items.popleft().future.result()
                if not self._items and self._is_over:
                    raise StopIteration
                self._wait()
        except StopIteration:
            raise
        except BaseException:
            self._stop_all()
            raise

    def _restart_stopped(self) -> None:
        for item in self._items:
            if item.is_stopped:
                item.is_stopped = False
                self._start(item)

    def _start_next(self) -> None:
        """Read and start the items that can be had without waiting."""
        while self._can_start():
            try:
                item = _Item(next(self._source))
            except StopIteration:
                self._is_over = True
            except Exception as error:
                self._items.append(_Item(None, _failed(error)))
            else:
                self._items.append(item)
                self._start(item)

    def _can_start(self) -> bool:
        """Tell whether there is room for another item, and it can be had without waiting."""
        num_running = sum(item.is_running for item in self._items)
        if self._is_over or num_running >= self._window or len(self._items) >= _READ_AHEAD * self._window:
            return False
        if self._reader is None:
            return True
        with self._wakeup:
            return self._reader.ask(self._batch_size)

    def _start(self, item: _Item) -> None:
        context = contextvars.copy_context()  # With the consumer's cache salt.
        work = (_run, self._function, item.value, item.cancellation, item.future, self._wakeup)
        # Not from an executor: the interpreter would wait for its threads before it tells that it exits. Not a daemon,
        # as it would be if the consumer is one: the interpreter must wait, and not pull torch from under the item.
        threading.Thread(target=context.run, args=work, name="hf_paged-item", daemon=False).start()

    def _is_first_done(self) -> bool:
        return bool(self._items) and self._items[0].future.done()

    def _wait(self) -> None:
        """Wait until the first item is done, or another one has arrived for which there is room."""
        with self._wakeup:
            while not self._is_first_done() and not self._can_start():
                self._wakeup.wait()

    def _stop_all(self) -> None:
        """Stop the items that run, and wait until their threads have left them."""
        running = [item for item in self._items if item.is_running]
        for item in running:
            item.cancellation.cancel()
        wait([item.future for item in running])
        for item in running:
            item.future, item.cancellation, item.is_stopped = Future(), Cancellation(), True


def _run(function, value, cancellation: Cancellation, future: Future, wakeup: threading.Condition) -> None:
    try:
        future.set_result(function(value, cancellation))
    except BaseException as error:
        future.set_exception(error)
        del future  # The error's traceback holds this frame: no cycle.
    with wakeup:
        wakeup.notify_all()


def _failed(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


def _abandon(items: deque[_Item], reader: Reader | None) -> None:
    for item in items:
        item.cancellation.cancel()
    if reader is not None:
        reader.close()
