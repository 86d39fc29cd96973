"""Reader: an iterator that is read in a thread of its own, so that its consumer need not wait for the next item."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class Reader:
    """An iterator over the items of another one, which a thread reads: as many as were asked for.

    Parameters
    ----------
    items : iterator
    wakeup : threading.Condition
        Notified when an item has arrived. Its lock guards the reader.
    """

    def __init__(self, items: Iterator, wakeup: threading.Condition):
        self._wakeup, self._wanted, self._is_closed, self._is_over = wakeup, 0, False, False
        self._arrived: deque[tuple[Any, BaseException | None]] = deque()  # (item, error that came in its place)
        self._items: Iterator | None = items  # None: the thread has it.
        self._thread: threading.Thread | None = None

    def ask(self, count: int) -> bool:
        """Tell whether `count` items, or the end, have arrived; let the thread read what is missing.

        The caller holds `wakeup`.
        """
        missing = count - len(self._arrived)
        if missing <= 0 or self._is_over:
            return True
        if self._wanted < missing:
            self._wanted = missing
            self._wakeup.notify_all()
        if self._thread is None:
            # A daemon: an iterator that waits for its next item cannot be interrupted.
            self._thread = threading.Thread(target=self._read, name="hf_paged-reader", daemon=True)
            self._thread.start()
        return False

    def close(self) -> None:
        """Read no more."""
        with self._wakeup:
            self._is_closed = True
            self._wakeup.notify_all()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self):
        with self._wakeup:
            while not self.ask(1):
                self._wakeup.wait()
            if not self._arrived:
                raise StopIteration
            item, error = self._arrived.popleft()
        if error is not None:
            raise error
        return item

    def _read(self) -> None:
        items, self._items = self._items, None  # A generator is closed when this thread lets go of it.
        assert items is not None, "the reader has two threads"
        while self._wait_for_demand():
            item, error = None, None
            try:
                item = next(items)
            except StopIteration:
                with self._wakeup:
                    self._is_over = True
                    self._wakeup.notify_all()
                return
            except BaseException as raised:
                error = raised
            with self._wakeup:
                self._arrived.append((item, error))
                self._wanted -= 1
                self._wakeup.notify_all()

    def _wait_for_demand(self) -> bool:
        """Wait until an item is wanted; False if the reader is closed."""
        with self._wakeup:
            while not self._wanted and not self._is_closed:
                self._wakeup.wait()
            return not self._is_closed


class ReadInThread:
    """An iterable whose iterators are readers.

    Parameters
    ----------
    items : iterable
    wakeup : threading.Condition
        Of the readers.

    Attributes
    ----------
    reader : Reader or None
        The newest iterator.
    """

    def __init__(self, items: Iterable, wakeup: threading.Condition):
        self._items, self._wakeup = items, wakeup
        self.reader: Reader | None = None

    def __iter__(self) -> Reader:
        self.reader = Reader(iter(self._items), self._wakeup)
        return self.reader
