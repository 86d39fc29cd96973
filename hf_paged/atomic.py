"""Atomic sections: changes of shared state that no interrupt can cut in two.

Python runs signal handlers in the main thread, between any two of its instructions. An exception from there
(KeyboardInterrupt, the time limit of a test runner) may leave counts, queues and tables half changed. So what changes
the state of a pool or of an engine is a section: a function that a thread of ours runs, which no handler enters. The
caller waits for it. A caller that is interrupted meanwhile leaves; the section still runs to its end.

Sections run one at a time, in the order in which they were handed over, and must be short: no forward, no product of
matrices, nothing that waits for a caller. A caller holds no lock that a section takes. A process forks between two
sections, never inside one.
"""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from transformers.utils import logging

logger = logging.get_logger(__name__)
_IDLE = 1.0  # Seconds without a section after which there is time for what can wait.
Result = TypeVar("Result")


class _Worker:
    """The thread that runs sections. It is started when one comes, and ends when none has come for a while and nothing
    is left to do meanwhile (`when_idle`).
    """

    def __init__(self):
        self._sections: SimpleQueue = SimpleQueue()
        self._has_thread = False
        self.turn = threading.Lock()
        self._ident: int | None = None  # Of the thread whose turn it is.

    def is_current(self) -> bool:
        return threading.get_ident() == self._ident

    def submit(self, section: Callable, outcome: SimpleQueue | None) -> None:
        self._sections.put((section, outcome))
        if not self._has_thread:  # The thread sets it: the caller that starts the thread may be interrupted.
            threading.Thread(target=self._run, name="hf_paged-state", daemon=True).start()

    def _run(self) -> None:
        with self.turn:  # Callers that come at the same time may start a thread each: the others wait here.
            self._ident, self._has_thread = threading.get_ident(), True
            idle_seconds = 0.0
            while self._has_thread:
                try:
                    self._run_one(*self._sections.get(timeout=_IDLE))
                    idle_seconds = 0.0
                except Empty:
                    idle_seconds += _IDLE
                    self._has_thread = _has_more_to_do(idle_seconds)
                    # A caller that came before that line has started no other thread.
                    self._has_thread = self._has_thread or not self._sections.empty()
            self._ident = None

    @staticmethod
    def _run_one(section: Callable, outcome: SimpleQueue | None) -> None:
        result: tuple[object, BaseException | None]
        try:
            result = section(), None
        except BaseException as error:
            if outcome is None:
                logger.error("hf_paged: giving back what a call held failed", exc_info=error)
            result = None, error
        if outcome is not None:
            outcome.put(result)
        del result  # An error's traceback holds this frame: no cycle.


_worker = _Worker()
_when_idle: list[Callable[[float], bool]] = []


def when_idle(function: Callable[[float], bool]) -> None:
    """Have `function` called when no section has come for a second, and every further second while it returns True.

    It is called as a section is, with the seconds since the last one.
    """
    _when_idle.append(function)


def _has_more_to_do(idle_seconds: float) -> bool:
    """Call what waits for an idle second; tells whether it wants to be called again."""
    try:
        return any([function(idle_seconds) for function in _when_idle])
    except BaseException as error:  # The thread must live: callers wait for its sections.
        logger.error("hf_paged: work that waited for an idle second failed", exc_info=error)
        return False


def atomically(section: Callable[[], Result]) -> Result:
    """Run `section` where no interrupt reaches it; returns what it returns, raises what it raises.

    A section may call this again: the inner one is a part of it.
    """
    if _worker.is_current():
        return section()
    outcome: SimpleQueue = SimpleQueue()
    _worker.submit(section, outcome)
    value, error = outcome.get()
    if error is not None:
        try:
            raise error
        finally:
            del error  # Its traceback holds this frame: no cycle.
    return value


def is_in_section() -> bool:
    """Tell whether a section is running this code: it must not wait for anything."""
    return _worker.is_current()


class Undo:
    """Runs a section when a block of code is left, however it is left.

    A second interrupt may hit the ``finally`` that handles the first. The section runs then when the frame that
    holds this object is gone.

    Parameters
    ----------
    section : callable
        Takes nothing, holds no reference to this object, and may run twice.
    """

    def __init__(self, section: Callable[[], object]):
        self._section = section
        self._finalizer = weakref.finalize(self, _post, section)
        self._finalizer.atexit = False

    def now(self) -> None:
        """Run the section and wait for its end."""
        atomically(self._section)
        self._finalizer.detach()


def _post(section: Callable) -> None:
    """Run `section` some time: a finalizer must not wait."""
    _worker.submit(section, None)


_after_fork: list[Callable[[], None]] = []
_resume: dict[int, Callable[[], None]] = {}  # Thread that forks -> the function that lets the worker go on.


def after_fork_in_child(function: Callable[[], None]) -> None:
    """Have `function` called in a forked child, which has one thread: that which forked. In order of registration."""
    _after_fork.append(function)


def _before_fork() -> None:
    """Let the worker finish its section and wait until the fork is over."""
    if _worker.is_current():
        return
    here = threading.get_ident()
    if _worker.turn.acquire(blocking=False):  # No thread runs sections, and none begins meanwhile.
        _resume[here] = _worker.turn.release
        return
    is_parked: SimpleQueue = SimpleQueue()
    go_on: SimpleQueue = SimpleQueue()
    _resume[here] = functools.partial(go_on.put, None)

    def park() -> None:
        is_parked.put(None)
        go_on.get()

    _worker.submit(park, None)
    is_parked.get()


def _in_parent() -> None:
    if (resume := _resume.pop(threading.get_ident(), None)) is not None:
        resume()


def _in_child() -> None:
    global _worker
    _resume.clear()
    _worker = _Worker()
    for function in _after_fork:
        function()


with contextlib.suppress(AttributeError):  # Systems without fork.
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
