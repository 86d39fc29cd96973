"""A section of a report: figures, tables, plots and sentences. JSON-able by ``dataclasses.asdict``."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """One number that can be compared between runs.

    Attributes
    ----------
    unit : str
        Such as ``"tokens/s"``, ``"%"``, ``"nats/token"``.
    low, high : float or None
        The ends of its 95 % interval.
    better : str or None
        ``"higher"``, ``"lower"``, or None if neither is.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    better: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers, as long as `columns` each. None stands for a cell without a value."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture as data.

    Attributes
    ----------
    kind : str
        ``"line"``, ``"bar"`` or ``"heatmap"``.
    x_label, y_label : str
        With their units.
    series : dict of str to list
        Line and bar: name to ``[[x, y], ...]``. Heatmap: ``{"values": rows of the matrix}``.
    x_ticks, y_ticks : list of str
        Names of the columns and rows of a heatmap, or of the bars.
    """

    title: str
    kind: str
    x_label: str
    y_label: str
    series: dict[str, list[list[float]]]
    x_ticks: list[str] = field(default_factory=list)
    y_ticks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """The part of a report that one task or microbenchmark adds.

    Attributes
    ----------
    task : str
        The name of the task or microbenchmark.
    summary : str
        One or two sentences that a person reads first.
    notes : list of str
        How it was done, and the limits of what it says.
    flags : list of str
        Faults of the backend by this task, a sentence each; empty if there are none.
    seconds : float
        Time spent in the samples, of all processes together. The runner sets it.
    """

    task: str
    title: str
    summary: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0
