"""Contenders timed in turns, so that all of them see the same noise of a shared machine."""

import time
from collections.abc import Callable

_WARM_TURNS = 2


def take_turns(contenders: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call. Every turn runs each contender once.

    A contender gets a number that grows by one from call to call, of all contenders together: what it takes from a
    rotating set with that number has left the processor's caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = 0
    for turn in range(_WARM_TURNS + repeats):
        for name, run in contenders.items():
            began = time.perf_counter()
            run(calls)
            elapsed = time.perf_counter() - began
            calls += 1
            if turn >= _WARM_TURNS:
                seconds[name].append(elapsed)
    return seconds
