"""Calls of several threads at once against the same calls one after another: wall time and equality.

A ragged prompt per call, greedy. The pool is released before each timed run.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from transformers import PreTrainedModel

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_dataset, add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "threads"
QUICK = {"threads": 3, "new_tokens": 3, "max_prompt": 64, "repeats": 1}
_DENSE, _IN_TURN, _AT_ONCE = "dense, one after another", "paged, one after another", "paged, all at once"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    add_dataset(parser)
    parser.add_argument("--threads", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most (default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of all calls, by the way that they are made."""
    options = model_options(given, NAME)
    prompts = [torch.tensor([ids]) for ids in workloads.ragged(options, given.threads + 1, given.max_prompt)]
    warm, prompts = prompts[-1:], prompts[:-1]
    paged = load_model(options, "paged")
    runs = _runs(load_model(options, "sdpa"), paged, given.new_tokens)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rows = {}
    for turn in range(1 + given.repeats):  # The first turn warms up.
        for name, run in runs.items():
            hf_paged.release(paged)
            began = time.perf_counter()
            rows[name] = run(prompts if turn else warm)
            if turn:
                times[name].append(time.perf_counter() - began)
    seconds = {name: median(values) for name, values in times.items()}
    equal = {name: sum(torch.equal(*pair) for pair in zip(rows[name], rows[_DENSE])) for name in (_IN_TURN, _AT_ONCE)}
    gain = seconds[_IN_TURN] / seconds[_AT_ONCE]
    return Section(
        NAME,
        "Calls of several threads",
        f"{len(prompts)} calls at once are {gain:.1f} times faster than one after another.",
        [
            *(Figure(name, value, "s", better="lower") for name, value in seconds.items()),
            Figure("at once over one after another, speed", gain, "x", better="higher"),
            Figure("at once over dense, speed", seconds[_DENSE] / seconds[_AT_ONCE], "x", better="higher"),
            *(Figure(f"rows equal to dense: {name}", count, f"of {len(prompts)}") for name, count in equal.items()),
        ],
        notes=[
            f"Prompts of {sum(ids.numel() for ids in prompts)} tokens in all, at most {given.new_tokens} new ones "
            f"each; medians of {given.repeats} turns."
        ],
    )


def _runs(
    dense: PreTrainedModel, paged: PreTrainedModel, new_tokens: int
) -> dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]]:
    """Functions from prompts to outputs, by name."""

    def generate(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)

    def at_once(prompts: list[torch.Tensor]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda ids: generate(paged, ids), prompts))

    return {
        _DENSE: lambda prompts: [generate(dense, ids) for ids in prompts],
        _IN_TURN: lambda prompts: [generate(paged, ids) for ids in prompts],
        _AT_ONCE: at_once,
    }


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
