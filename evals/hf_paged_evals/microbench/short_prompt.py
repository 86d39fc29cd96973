"""One short prompt: `generate` dense and paged in turns, where pages have nothing to win."""

import argparse
import sys
from statistics import median

import torch

from hf_paged_evals.data import workloads
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "short_prompt"
_CONTENDERS = {"dense": "sdpa", "paged": "paged"}
QUICK = {"prompt": 8, "new_tokens": 4, "repeats": 1}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of one greedy call, dense and paged."""
    options, count = model_options(given, NAME), given.new_tokens
    ids = torch.tensor(workloads.uniform(options, 1, given.prompt))
    mask = torch.ones_like(ids)
    models = {name: load_model(options, implementation) for name, implementation in _CONTENDERS.items()}

    def generate(model) -> None:
        model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    runs = {name: lambda turn, model=model: generate(model) for name, model in models.items()}
    seconds = {name: median(times) for name, times in take_turns(runs, given.repeats).items()}
    speed = seconds["dense"] / seconds["paged"]
    return Section(
        NAME,
        "One short prompt",
        f"Paged runs at {speed:.2f} times the speed of dense.",
        [
            *(Figure(name, value, "s", better="lower") for name, value in seconds.items()),
            Figure("paged over dense, speed", speed, "x", better="higher"),
        ],
        notes=[f"One prompt of {given.prompt} random tokens, {count} new ones; medians of {given.repeats} turns."],
    )


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
