"""What an evaluation is: samples that are run one by one, and a section of the report made of their records."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from .models import Models
    from .options import Options


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
    """Rows of text and numbers, as long as `columns` each."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int]]
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
    """What a task adds to the report; JSON-able by ``dataclasses.asdict``.

    Attributes
    ----------
    summary : str
        One or two sentences that a person reads first.
    notes : list of str
        How it was done, and what it does not say.
    flags : list of str
        What is wrong with the backend by this task, a sentence each; empty if nothing is.
    seconds : float
        The runner sets it: time spent in the samples, of all processes together.
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


@dataclass(frozen=True)
class Sample:
    """The unit of resuming and of sharding: a batch of prompts, a window of text, one timed configuration.

    Attributes
    ----------
    id : str
        Unique in its task.
    payload : dict
        What `Task.run` needs. It is made anew by `Task.samples` in every process, never stored.
    """

    id: str
    payload: dict


class Task(Protocol):
    """An evaluation. Its object holds no state: records are all that is known of a sample that was run.

    Attributes
    ----------
    name : str
        Also the word on the command line.
    settings, quick : dict
        What ``--set NAME.KEY=VALUE`` can change, with its defaults, and the defaults of ``--quick`` where they
        differ. `Options.settings_of` puts them together.
    is_timed : bool
        Whether other processes would disturb it: such a task runs in the main process while the others wait.
    """

    name: str
    title: str
    settings: ClassVar[dict]
    quick: ClassVar[dict]
    is_timed: ClassVar[bool]

    def samples(self, options: "Options") -> list[Sample]:
        """All samples, the same ones in the same order for the same options.

        Raises
        ------
        ImportError, PagedError, ValueError
            Whatever the options ask for that is not there: this is called before anything runs.
        """

    def run(self, sample: Sample, models: "Models") -> dict:
        """Run one sample; the record is JSON-able and holds no times that `summarise` would turn into accuracy."""

    def summarise(self, records: list[dict], options: "Options") -> Section:
        """The section of these records, in the order of the samples. Depends on nothing else."""
