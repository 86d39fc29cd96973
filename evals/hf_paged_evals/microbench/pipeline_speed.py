"""A text-generation pipeline over ragged prompts: stock at several batch sizes, and paged with default arguments.

The pipeline's default is to sample, and no seed is set. Every contender first generates from other prompts. Besides
the times: how many prompts were read when the first result came, and the longest wait between two results.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from transformers import Pipeline, pipeline

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model, load_tokenizer
from hf_paged_evals.runner.arguments import add_dataset, add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "pipeline_speed"
QUICK = {"prompts": 4, "new_tokens": 3, "max_prompt": 64}
_PAGED = "paged"
_WARM_ROWS = 2


@dataclass(frozen=True)
class Run:
    """One pass of a pipeline over all prompts: seconds, and the prompts that were read at the first result."""

    total: float
    first: float
    read_at_first: int
    longest_wait: float


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    add_dataset(parser)
    parser.add_argument("--prompts", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most (default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 16, 32], help="(default: 1 8 16 32)")
    parser.add_argument("--repeats", type=int, default=1, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of each contender."""
    options, tokenizer = model_options(given, NAME), load_tokenizer(model_options(given, NAME))
    ids = workloads.ragged(options, given.prompts + _WARM_ROWS, given.max_prompt)
    texts = [tokenizer.decode(prompt) for prompt in ids]
    warm, prompts = texts[-_WARM_ROWS:], texts[:-_WARM_ROWS]
    models = {name: load_model(options, name) for name in ("sdpa", "paged")}
    stock, paged = (
        pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=given.new_tokens)
        for model in models.values()
    )
    contenders = {_stock_name(size): (stock, {"batch_size": size} if size > 1 else {}) for size in given.batch_size}
    contenders[_PAGED] = (paged, {})
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for turn in range(1 + given.repeats):
        for name, (pipe, arguments) in contenders.items():
            hf_paged.release(models["paged"])
            run = timed(pipe, arguments, prompts if turn else warm)
            if turn:
                runs[name].append(run)
    return _section(runs, len(prompts), sum(map(len, ids[:-_WARM_ROWS])), given)


def timed(pipe: Pipeline, arguments: dict, prompts: list[str]) -> Run:
    """Run a pipeline over prompts that it reads one by one."""
    read, read_at_first, times = 0, 0, []

    def arriving() -> Iterator[str]:
        nonlocal read
        for prompt in prompts:
            read += 1
            yield prompt

    began = time.perf_counter()
    for number, _ in enumerate(pipe(arriving(), **arguments)):
        times.append(time.perf_counter() - began)
        if number == 0:
            read_at_first = read
    waits = [later - earlier for earlier, later in zip(times, times[1:])]
    return Run(times[-1], times[0], read_at_first, max(waits, default=0.0))


def _stock_name(batch_size: int) -> str:
    return "stock, default arguments" if batch_size == 1 else f"stock, batch_size={batch_size}"


def _section(runs: dict[str, list[Run]], count: int, tokens: int, given: argparse.Namespace) -> Section:
    seconds = {name: median(run.total for run in some) for name, some in runs.items()}
    best = min((name for name in seconds if name != _PAGED), key=lambda name: seconds[name])
    gain, last = seconds[best] / seconds[_PAGED], runs[_PAGED][-1]
    rows = [
        [name, seconds[name], seconds[name] / seconds[_PAGED], some[-1].first, some[-1].read_at_first]
        + [some[-1].longest_wait]
        for name, some in runs.items()
    ]
    columns = ["Contender", "Time (s)", "Paged over this (x)", "First result (s)", "Prompts read by then"]
    return Section(
        NAME,
        "A pipeline over ragged prompts",
        f"Paged takes {seconds[_PAGED]:.1f} s, the best stock one {seconds[best]:.1f} s.",
        [
            *(Figure(name, value, "s", better="lower") for name, value in seconds.items()),
            Figure("paged over the best stock one, speed", gain, "x", better="higher"),
            Figure("paged, prompts read at the first result", last.read_at_first, f"of {count}"),
            Figure("paged, longest wait between results", last.longest_wait, "s", better="lower"),
        ],
        [Table("By contender", [*columns, "Longest wait (s)"], rows)],
        notes=[f"{count} prompts of {tokens} tokens, at most {given.new_tokens} new ones; {given.repeats} turns."],
    )


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
