"""The cost of seeing that a model is still the same, per call and per step of `generate`.

`identify` runs once per call, `Identity.holds` once per step. Both take turns with one decode step of the given rows.
"""

import argparse
import sys
from statistics import median

from hf_paged.models.fingerprint import identify
from hf_paged_evals.microbench.decode_step import stepper
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "identity_cost"
QUICK = {"context": 16, "repeats": 2}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="rows of the step (default: 1 32)")
    parser.add_argument("--context", type=int, default=128, help="tokens per row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of both looks, and their shares of a decode step."""
    model = load_model(model_options(given, NAME), "paged")
    identity = identify(model)
    looks = {"per call": lambda turn: identify(model), "per step": lambda turn: identity.holds()}
    figures = []
    for rows in given.rows:
        times = take_turns({**looks, "step": stepper(model, rows, given.context)}, given.repeats)
        seconds = {name: median(values) for name, values in times.items()}
        for name in looks:
            share = 100 * seconds[name] / seconds["step"]
            figures.append(Figure(f"{rows} rows: {name}", 1000 * seconds[name], "ms", better="lower"))
            figures.append(Figure(f"{rows} rows: {name}, of a step", share, "%", better="lower"))
    return Section(
        NAME,
        "Seeing that a model is the same",
        "Times of a look at the model, in turns with decode steps.",
        figures,
        notes=[f"Medians of {given.repeats} interleaved turns, {given.context} tokens per row."],
        flags=[] if identity.holds() else ["a decode step changes what the model is known by"],
    )


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
