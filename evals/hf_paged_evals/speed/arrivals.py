"""Times at which requests arrive and their tokens leave."""

import random
import time
from dataclasses import dataclass, field

from transformers.generation import BaseStreamer


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start until each of `count` requests arrives, `rate` a second on average."""
    chosen, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chosen.expovariate(rate)
        found.append(now)
    return found


@dataclass
class Clock(BaseStreamer):
    """Notes the time of every step of one ``generate``.

    Attributes
    ----------
    times : list of float
        ``time.perf_counter`` when each token was there.
    """

    times: list[float] = field(default_factory=list)
    _has_prompt: bool = False

    def put(self, value) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True  # The first thing that ``generate`` hands out is the prompt.

    def end(self) -> None:
        pass
