"""Run ahead: a function over the items of an iterator, many at a time in threads, results in order.

The iterator itself is drawn on in the consumer's thread, as a plain loop would. Only an iterable that may keep
one waiting (a generator over a queue) is read in a thread of its own, and only while the consumer waits here:
a result that is ready does not wait for the next item to arrive.
"""

import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from hf_paged.sampling.cancellation import Cancellation

_READ_AHEAD = 2  # Items read and not yet returned, at most, as a multiple of those that run.


class Reader:
    """An iterator whose items are read by a thread, as many as were asked for.

    Parameters
    ----------
    items : iterator
    news : threading.Condition
        Notified when an item has arrived.
    """

    def __init__(self, items: Iterator, news: threading.Condition):
        self._news, self._wanted, self._is_closed, self._is_over = news, 0, False, False
        self._arrived: deque[tuple[Any, BaseException | None]] = deque()
        self._items: Iterator | None = items
        self._thread: threading.Thread | None = None

    def ask(self, count: int) -> bool:
        """Whether `count` items, or the end, have arrived; what is missing is read. Call it with `news` held."""
        missing = count - len(self._arrived)
        if missing <= 0 or self._is_over:
            return True
        if self._wanted < missing:
            self._wanted = missing
            self._news.notify_all()
        if self._thread is None:
            # A daemon: nobody can interrupt an iterator that waits for its next item.
            self._thread = threading.Thread(target=self._read, name="hf_paged-reader", daemon=True)
            self._thread.start()
        return False

    def close(self) -> None:
        """Read no more."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self):
        with self._news:
            while not self.ask(1):
                self._news.wait()
            if not self._arrived:
                raise StopIteration
            item, error = self._arrived.popleft()
        if error is not None:
            raise error
        return item

    def _read(self) -> None:
        items, self._items = self._items, None  # A generator is closed when this thread lets go of it.
        while True:
            with self._news:
                while not self._wanted and not self._is_closed:
                    self._news.wait()
                if self._is_closed:
                    return
            try:
                arrival = next(items), None
            except StopIteration:
                arrival = None
            except BaseException as error:
                arrival = None, error
            with self._news:
                if arrival is None:
                    self._is_over = True
                else:
                    self._arrived.append(arrival)
                    self._wanted -= 1
                self._news.notify_all()
                if self._is_over:
                    return


class Arrivals:
    """An iterable whose every iterator is a `Reader`; `reader` is the newest."""

    def __init__(self, items: Iterable, news: threading.Condition):
        self._items, self._news, self.reader = items, news, None

    def __iter__(self) -> Reader:
        self.reader = Reader(iter(self._items), self._news)
        return self.reader


@dataclass
class _Item:
    value: Any
    future: Future | None = None  # None: not started.
    cancellation: Cancellation | None = None


class Prefetch:
    """Results of ``function(item, cancellation)`` in the order of the items, many of which run at a time.

    An error, of the function or of the source, is raised in its item's place; what runs ahead is stopped then and
    starts anew if somebody asks for the next result. An iterator that is dropped stops what runs ahead.

    Parameters
    ----------
    function : callable
        Runs in threads. Returns soon after its cancellation is set; its result counts for nothing then.
    source : iterator
        Items, drawn on in the consumer's thread.
    reader : Reader or None
        What the source reads from, if that may keep it waiting.
    items_per_draw : int
        Items of `reader` that one draw on the source takes.
    window : int
        Items that run at the same time.
    news : threading.Condition
        The reader's.
    """

    def __init__(
        self,
        function: Callable[[Any, Cancellation], Any],
        source: Iterator,
        reader: Reader | None,
        items_per_draw: int,
        window: int,
        news: threading.Condition,
    ):
        self._function, self._source, self._reader = function, source, reader
        self._items_per_draw, self._window, self._news = items_per_draw, window, news
        self._items: deque[_Item] = deque()
        self._is_over = False
        weakref.finalize(self, _abandon, self._items, reader)

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        try:
            while True:
                self._start_items()
                if self._items and self._items[0].future.done():
                    return self._items.popleft().future.result()
                if not self._items and self._is_over:
                    raise StopIteration
                self._wait()
        except StopIteration:
            raise
        except BaseException:
            self._stop_items()
            raise

    def _start_items(self) -> None:
        """Start what can be started without waiting."""
        for item in self._items:
            if item.future is None:  # It was stopped.
                self._start(item)
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
        """Whether there is room for another item, and it can be had without waiting."""
        running = sum(not item.future.done() for item in self._items)
        if self._is_over or running >= self._window or len(self._items) >= _READ_AHEAD * self._window:
            return False
        if self._reader is None:
            return True
        with self._news:
            return self._reader.ask(self._items_per_draw)

    def _start(self, item: _Item) -> None:
        item.cancellation, item.future = Cancellation(), Future()
        context = contextvars.copy_context()  # The cache salt of whoever iterates.
        work = (_run, self._function, item.value, item.cancellation, item.future, self._news)
        # Not from an executor: the interpreter would wait for its threads before it tells that it exits.
        threading.Thread(target=context.run, args=work, name="hf_paged-item").start()

    def _wait(self) -> None:
        """Wait until the first item is done, or there is room for another one and it has arrived."""
        with self._news:
            while not (self._items and self._items[0].future.done()) and not self._can_start():
                self._news.wait()

    def _stop_items(self) -> None:
        """Stop what runs, and wait until it has left; it has not begun then."""
        stopped = [item for item in self._items if item.future is not None and not item.future.done()]
        for item in stopped:
            item.cancellation.cancel()
        wait([item.future for item in stopped])
        for item in stopped:
            item.future = None


def _run(function, value, cancellation: Cancellation, future: Future, news: threading.Condition) -> None:
    try:
        future.set_result(function(value, cancellation))
    except BaseException as error:
        future.set_exception(error)
        del future  # The error's traceback holds this frame: no cycle.
    with news:
        news.notify_all()


def _failed(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


def _abandon(items: deque[_Item], reader: Reader | None) -> None:
    for item in items:
        if item.cancellation is not None:
            item.cancellation.cancel()
    if reader is not None:
        reader.close()
