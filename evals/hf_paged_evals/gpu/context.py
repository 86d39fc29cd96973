"""Context: what a stage is given."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_paged_evals.gpu.recorder import Recorder


@dataclass(frozen=True)
class Context:
    """The surroundings of a stage, in its own process.

    Attributes
    ----------
    device : torch.device
        The card, or the CPU in a dry run.
    is_dry : bool
        Sizes are tiny, and times say nothing.
    out : Path
        The folder of the run.
    recorder : Recorder
    deadline : float
        By `time.monotonic`: the stage is killed then.
    """

    device: torch.device
    is_dry: bool
    out: Path
    recorder: Recorder
    deadline: float

    def say(self, kind: str, **values) -> None:
        """Record a finding; see `Recorder.say`."""
        self.recorder.say(kind, **values)

    def refuse(self, what: str, why: object) -> None:
        """Record that something could not be measured, and why."""
        self.say("refused", what=what, why=f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why))

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Go on after an error of what is measured inside: it is recorded as refused, with its place."""
        try:
            yield
        except Exception as error:
            self.refuse(what, error)
            self.say("error", error=traceback.format_exc())

    @property
    def seconds_left(self) -> float:
        """Until the stage is killed."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give the memory that nothing holds any more back to the card."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
