"""A look at something, again and again while something else runs."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Watch(Generic[T]):
    """A context whose thread calls `look` every few seconds, and once more at the end.

    Attributes
    ----------
    seen : list of (seconds, value)
        Since the context was entered.
    """

    def __init__(self, look: Callable[[], T], every: float):
        self._look, self._every = look, every
        self.seen: list[tuple[float, T]] = []
        self._over = threading.Event()

    def __enter__(self) -> "Watch[T]":
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        self._thread.join()
        self._note()

    def _run(self) -> None:
        while not self._over.is_set():
            self._note()
            self._over.wait(self._every)

    def _note(self) -> None:
        self.seen.append((time.perf_counter() - self._began, self._look()))


def thinned(points: list, most: int = 120) -> list:
    """At most so many of the points, evenly spread, the last one included: as many as a plot can show."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(index * step)] for index in range(most)]
