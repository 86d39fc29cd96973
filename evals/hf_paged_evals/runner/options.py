"""The options of one evaluation run."""

from dataclasses import asdict, dataclass, field

from hf_paged.config import PagedConfig
from hf_paged.memory.kv_format import KV_FORMATS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DatasetChoice:
    """A source of texts or prompts: anything that ``datasets.load_dataset`` reads.

    Attributes
    ----------
    name : str
        A name on the hub, or a local ``.json``, ``.jsonl``, ``.parquet``, ``.csv`` or ``.txt`` file, or a folder.
    subset, split : str or None
        None: the only one, or for splits the first of test, validation and train.
    column : str or None
        None: the first of the usual names (text, prompt, question, ...) that is there.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class Options:
    """The subject of a run and its data. Validated when they are made; equal options give equal samples.

    Attributes
    ----------
    out : str
        The folder of the report and of the samples that were run.
    tasks : tuple of str
        Names of tasks, in the order of the report.
    model : str
        A hub name, a local folder, ``"smollm2"`` for the demo model, or ``"smollm2-qwen"`` for that with outlier keys.
    dtype : str
        Of weights, computation and KV.
    limit : int or None
        At most so many prompts, windows, problems or configurations a task.
    quick : bool
        The small settings of every task.
    baseline, backend : str
        Attention implementations: the one that is trusted and the one that is judged.
    kv_dtype : str or None
        A name in `KV_FORMATS`, in which the backend's keys and values are stored. Or a torch dtype, such as
        ``"float8_e5m2"``, to which they are rounded before they are stored as they are. None: stored as they are.
    block_size, memory_budget, token_budget
        As in `PagedConfig`. A small `memory_budget` makes rows queue and be preempted.
    dataset : DatasetChoice or None
        None: the offline data of each task.
    extra : dict of str to dict
        Settings of single tasks, by their names.
    """

    out: str
    tasks: tuple[str, ...]
    model: str = "smollm2"
    dtype: str = "float32"
    limit: int | None = None
    seed: int = 0
    quick: bool = False
    baseline: str = "sdpa"
    backend: str = "paged"
    kv_dtype: str | None = None
    block_size: int = PagedConfig.block_size
    memory_budget: int | str | None = None
    token_budget: int | None = PagedConfig.token_budget
    dataset: DatasetChoice | None = None
    extra: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("no task was named: leave --tasks out to run all of them")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1; got {self.limit}: leave it out to run everything")
        unused = sorted(self.extra.keys() - set(self.tasks))
        if unused:
            raise ValueError(f"settings for {', '.join(unused)}, which is not among the tasks {', '.join(self.tasks)}")
        if self.kv_dtype is not None and self.backend != "paged":
            raise ValueError(
                f"kv_dtype rounds what pages hold, and the backend is {self.backend!r}: use --backend paged"
            )
        self.paged_config()

    def paged_config(self) -> PagedConfig:
        """The paging of the backend's cache."""
        kv_dtype = self.kv_dtype if self.kv_dtype in KV_FORMATS else None
        return PagedConfig(self.block_size, self.memory_budget, self.token_budget, kv_dtype=kv_dtype)

    @property
    def baseline_name(self) -> str:
        """The baseline in tables and figures."""
        return self.baseline

    @property
    def backend_name(self) -> str:
        """The backend in tables and figures: not the baseline's name, even where it is judged against itself."""
        name = self.backend if self.kv_dtype is None else f"{self.backend} ({self.kv_dtype} KV)"
        return name if name != self.baseline else f"{name} again"

    def settings_of(self, task) -> dict:
        """The settings of a task: its own, those of ``quick``, then `extra`.

        Raises
        ------
        ValueError
            If `extra` names a setting that the task has not, or gives one another type.
        """
        settings = {**task.settings, **(task.quick if self.quick else {})}
        for name, value in self.extra.get(task.name, {}).items():
            if name not in settings:
                known = ", ".join(settings) or "none"
                raise ValueError(f"{task.name} has no setting {name!r}: it knows {known}")
            default = settings[name]
            if default is not None and not _same_kind(value, default):
                raise ValueError(f"{task.name}.{name} must be like {default!r}; got {value!r}")
            settings[name] = value
        return settings

    def identity(self) -> dict:
        """All that decides the records; runs that differ in it must not share a folder."""
        fields = asdict(self)
        del fields["out"]
        fields["tasks"] = list(self.tasks)
        return fields


def _same_kind(value, default) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))
