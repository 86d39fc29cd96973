"""Paired statistics: differences of two backends on the same samples, with their intervals."""

import math
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # The normal quantile of a two-sided 95 % interval.
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high

    def times(self, factor: float) -> "Estimate":
        """In another unit; `factor` is positive."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def proportion(hits: int, count: int) -> Estimate:
    """A share with Wilson's interval, which is honest at 0 and 1 as well.

    Raises
    ------
    ValueError
        If there are no samples.
    """
    _check_count(count)
    share, z2 = hits / count, _Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At 0 and 1 the ends are exact; rounding must not put them past the share.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


@dataclass(frozen=True)
class PairedOutcomes:
    """Yes or no of two backends on the same samples.

    Attributes
    ----------
    both, only_first, only_second, neither : int
        Samples by the backends that got them right.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def count(cls, first: list[bool], second: list[bool]) -> "PairedOutcomes":
        """From the outcomes, in the same order.

        Raises
        ------
        ValueError
            If there are none, or not as many of both.
        """
        if len(first) != len(second):
            raise ValueError(f"paired outcomes must be as many: {len(first)} and {len(second)}")
        _check_count(len(first))
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second)]
        return cls(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def first(self) -> Estimate:
        return proportion(self.both + self.only_first, self.total)

    @property
    def second(self) -> Estimate:
        return proportion(self.both + self.only_second, self.total)

    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how often chance alone divides the discordant samples as unevenly."""
        discordant = self.only_first + self.only_second
        tail = sum(math.comb(discordant, k) for k in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * tail / 2**discordant)

    def difference(self) -> Estimate:
        """Share of the second minus that of the first, with the interval of Bonett and Price (2012).

        It adds one discordant sample on each side, so its width is honest where all samples agree.
        """
        count = self.total + 2
        first, second = (self.only_first + 1) / count, (self.only_second + 1) / count
        half = _Z * math.sqrt((first + second - (second - first) ** 2) / count)
        value = (self.only_second - self.only_first) / self.total
        centre = second - first
        return Estimate(value, max(-1.0, centre - half), min(1.0, centre + half))


def bootstrap_ratio(totals: list[float], weights: list[float], seed: int = 0) -> Estimate:
    """``sum(totals) / sum(weights)`` with the percentile interval of resampled samples.

    Parameters
    ----------
    totals, weights : list of float
        One per sample, such as a window's difference in nats and its number of tokens.
    seed : int
        Of the resampling.
    """
    _check_count(len(totals))
    totals, weights = np.asarray(totals, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(totals), size=(_RESAMPLES, len(totals)))
    ratios = totals[chosen].sum(axis=1) / weights[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(totals.sum() / weights.sum()), float(low), float(high))


def bootstrap_mean(values: list[float], seed: int = 0) -> Estimate:
    """The mean of some samples with the percentile interval of resampled ones."""
    return bootstrap_ratio(values, [1.0] * len(values), seed)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError("statistics of no samples: raise --limit")
