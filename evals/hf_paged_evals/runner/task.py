"""An evaluation: samples that are run one by one, and a section of the report made of their records."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from hf_paged_evals.runner.section import Section

if TYPE_CHECKING:
    from hf_paged_evals.models.pair import ModelPair
    from hf_paged_evals.runner.options import Options


@dataclass(frozen=True)
class Sample:
    """The unit of resuming and of sharding: a batch of prompts, a window of text, one timed configuration.

    Attributes
    ----------
    id : str
        Unique in its task.
    payload : dict
        The input of `Task.run`. `Task.samples` makes it anew in every process; it is never stored.
    """

    id: str
    payload: dict


class Task(Protocol):
    """An evaluation. Its object holds no state: records are all that is known of a sample that was run.

    Attributes
    ----------
    name : str
        Also the word on the command line.
    title : str
        Of its section.
    settings, quick : dict
        The settings that ``--set NAME.KEY=VALUE`` can change, with their defaults, and the defaults under ``--quick``
        where they differ. `Options.settings_of` puts them together.
    is_timed : bool
        Other processes would disturb it: such a task runs in the main process while the others wait.
    """

    name: str
    title: str
    settings: ClassVar[dict]
    quick: ClassVar[dict]
    is_timed: ClassVar[bool]

    def samples(self, options: "Options") -> list[Sample]:
        """All samples, the same ones in the same order for the same options. Runs nothing.

        Raises
        ------
        ImportError, PagedError, ValueError
            If the options ask for data, a model or a setting that is not there.
        """

    def run(self, sample: Sample, models: "ModelPair") -> dict:
        """Run one sample and return its record, which is JSON-able. Times in it are never turned into accuracy."""

    def summarise(self, records: list[dict], options: "Options") -> Section:
        """The section of these records, in the order of the samples. Depends on nothing else."""
