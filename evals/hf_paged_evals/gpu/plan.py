"""The stages of a run, in order of value, with the seconds that each may take."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from hf_paged_evals.gpu.context import Context


@dataclass(frozen=True)
class Stage:
    """A part of a run that has a process of its own.

    Attributes
    ----------
    name : str
        The word on the command line, and the name of a module of `hf_paged_evals.gpu.stages` with a function
        ``run(context)``.
    seconds : int
        After these it is killed.
    title : str
    """

    name: str
    seconds: int
    title: str

    def load(self) -> Callable[[Context], None]:
        """The function that runs the stage; imports its module."""
        return importlib.import_module(f"hf_paged_evals.gpu.stages.{self.name}").run


STAGES = (
    Stage("environment", 30, "card, driver, bandwidth, and what the host spends on a launch"),
    Stage("compile_ahead", 75, "every kernel of the later stages, in parallel"),
    Stage("op_accuracy", 60, "every op against float64, and a padded captured replay"),
    Stage("decode", 45, "decode attention: bytes a second, eager and captured"),
    Stage("decode_peers", 60, "decode attention beside the kernels of others"),
    Stage("model_step", 110, "decode steps of an 8B shape beside their floor and dense"),
    Stage("equality", 70, "float32 tokens of every mode against dense"),
    Stage("random_numbers", 20, "what dense draws on this card, number by number"),
    Stage("prefill", 30, "prefill attention: TFLOP/s, beside the kernels of others"),
    Stage("generate", 60, "generate with a 1B shape beside dense"),
    Stage("generate_batch", 60, "transformers' continuous batching with the same shape"),
    Stage("sanitizers", 95, "memcheck and racecheck of the kernels"),
    Stage("many_calls", 40, "many calls of one row at once"),
    Stage("plan_sweep", 40, "other launch plans of the decode kernel"),
    Stage("static_cache", 80, "a static cache, compiled, with the same shape"),
    Stage("host_profile", 40, "where the host spends a decode step"),
)
