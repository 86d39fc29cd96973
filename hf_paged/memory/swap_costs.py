"""SwapCosts: whether a block is brought back from the swap space sooner than it is computed again. No tensors here."""

from dataclasses import dataclass

_WEIGHT = 0.2  # Of a new measurement in an average.
# Swapping must be this much cheaper: what it delays besides, and the error of the averages, are not measured.
_MARGIN = 1.25
# A step with fewer new tokens of prompts takes as long for each as it takes to read the weights: the tokens that a
# preempted row computes again come in larger ones.
_LEAST_TOKENS = 32
# What a step leaves of a measured cost of the swap space while nothing is moved. A disk that was slow is tried again:
# after 200 steps it counts as 2.7 times as fast.
_FADING = 0.995


@dataclass
class Moved:
    """Bytes that were moved to the swap space and back, and how long it took, in seconds; None: it was not timed."""

    spilled: int = 0
    spill_seconds: float | None = None
    restored: int = 0
    restore_seconds: float | None = None


class SwapCosts:
    """Averages of what it costs to spill a block, to restore it, and to compute it again.

    Until a cost is measured it counts as nothing: the first blocks are moved, and tell.

    Parameters
    ----------
    block_bytes : int
        Of one block in all KV cache groups.
    block_size : int
        Tokens a block holds.

    Attributes
    ----------
    spill, restore : float or None
        Seconds for each byte. None: not measured yet.
    compute : float or None
        Seconds for each token.
    """

    def __init__(self, block_bytes: int, block_size: int):
        self.block_bytes, self.block_size = block_bytes, block_size
        self.spill: float | None = None
        self.restore: float | None = None
        self.compute: float | None = None

    @property
    def restoring_pays(self) -> bool:
        """Tell whether a spilled block is restored sooner than computed again."""
        return self._pays(self.restore or 0.0)

    @property
    def spilling_pays(self) -> bool:
        """Tell whether it costs less to spill and to restore a block than to compute it again."""
        return self._pays((self.spill or 0.0) + (self.restore or 0.0))

    def note_move(self, moved: Moved) -> float:
        """Note what was moved. Returns the seconds that it took, as far as they are known."""
        seconds = 0.0
        if moved.spilled and moved.spill_seconds is not None:
            self.spill = _average(self.spill, moved.spill_seconds / moved.spilled)
            seconds += moved.spill_seconds
        if moved.restored and moved.restore_seconds is not None:
            self.restore = _average(self.restore, moved.restore_seconds / moved.restored)
            seconds += moved.restore_seconds
        return seconds

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Note that a step ran so many tokens."""
        if num_tokens >= _LEAST_TOKENS:
            self.compute = _average(self.compute, seconds / num_tokens)
        self.spill = None if self.spill is None else self.spill * _FADING
        self.restore = None if self.restore is None else self.restore * _FADING

    def _pays(self, seconds_per_byte: float) -> bool:
        if self.compute is None:
            return True
        return self.block_bytes * seconds_per_byte * _MARGIN <= self.block_size * self.compute


def _average(before: float | None, now: float) -> float:
    return now if before is None else before + _WEIGHT * (now - before)
