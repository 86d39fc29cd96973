"""The report of a yes-or-no task: both shares, their paired difference, and a table of outcomes."""

from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Table
from hf_paged_evals.runner.statistics import PairedOutcomes

_LEVEL = 0.05


def describe(name: str, outcomes: PairedOutcomes, options: Options) -> tuple[str, list[Figure], Table, list[str]]:
    """A sentence, figures, a table and flags about paired outcomes.

    Parameters
    ----------
    name : str
        Of the share, such as ``"pass@1"``.
    outcomes : PairedOutcomes
        The baseline's first.
    """
    change, p_value = outcomes.difference().times(100), outcomes.p_value()
    baseline, backend = outcomes.first.times(100), outcomes.second.times(100)
    shares = f"{baseline.value:.1f} % with {options.baseline_name}, {backend.value:.1f} % with {options.backend_name}"
    words = (
        f"{name}: {shares} ({outcomes.total} samples); the paired difference is {change.value:+.1f} points, 95 % "
        f"interval {change.low:+.1f} to {change.high:+.1f} (half-width {change.half_width:.1f}), "
        f"McNemar p = {p_value:.3g}."
    )
    figures = [
        Figure(f"{name}, {options.baseline_name}", baseline.value, "%", baseline.low, baseline.high, "higher"),
        Figure(f"{name}, {options.backend_name}", backend.value, "%", backend.low, backend.high, "higher"),
        Figure(f"{name}, paired difference", change.value, "points", change.low, change.high, "higher"),
        Figure("McNemar p", p_value, ""),
    ]
    columns = ["", f"{options.backend_name} right", f"{options.backend_name} wrong"]
    rows: list[list[str | int]] = [
        [f"{options.baseline_name} right", outcomes.both, outcomes.only_first],
        [f"{options.baseline_name} wrong", outcomes.only_second, outcomes.neither],
    ]
    flags = [f"{name} differs by {change.value:+.1f} points, p = {p_value:.3g}"] if p_value < _LEVEL else []
    return words, figures, Table(f"Samples by outcome, {name}", columns, rows), flags
