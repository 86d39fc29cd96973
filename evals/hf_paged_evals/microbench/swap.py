"""A pool of a quarter of what a batch needs, and prompts that come again: computed again, or moved to a swap space.

First one call with rows of which the pool holds a quarter: rows wait, and are preempted. Then calls with one prompt
each, all prompts in turn, more than the pool holds: a first round that stores them, and a second one that could find
them.
"""

import argparse
import dataclasses
import sys
import time
from statistics import median

import torch
from transformers import PreTrainedModel

import hf_paged
from hf_paged.cli.plan.footprint import footprint
from hf_paged.cli.plan.plan import Plan
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "swap"
QUICK = {"rows": 4, "prompt": 24, "new_tokens": 8, "repeats": 1}
_WITHOUT, _WITH = "recompute", "swap space"
_COLUMNS = ["Pool", "Batch (s)", "Second round (s a prompt)", "Found (tokens)", "Preemptions", "Spilled", "Restored"]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="of the batch (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.25, help="of the batch that fits (default: %(default)s)")
    parser.add_argument("--swap-space", default="4GiB", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Times of both workloads, in turns."""
    options = model_options(given, NAME)
    ids = torch.tensor(workloads.uniform(options, given.rows, given.prompt, seed=1))
    model = load_model(options, "paged")
    length = given.prompt + given.new_tokens
    blocks = -(-length // options.block_size)
    of_block = Plan(footprint(model.config, model.dtype), 1, options.block_size, options.block_size, model.dtype)
    budget = max(blocks + 1, round(given.share * given.rows * blocks)) * of_block.budget_needed
    config = dataclasses.replace(options.paged_config(), memory_budget=budget)
    configs = {_WITHOUT: config, _WITH: dataclasses.replace(config, swap_space=given.swap_space)}
    runs: dict[str, list[dict]] = {name: [] for name in configs}
    for _ in range(given.repeats):
        for name, chosen in configs.items():
            hf_paged.configure(model, chosen)
            runs[name].append(_run(model, ids, given.new_tokens))
    hf_paged.configure(model, config)
    times = {
        name: {key: median(run[key] for run in of_name) for key in ("batch", "again")} for name, of_name in runs.items()
    }
    gains = {key: times[_WITHOUT][key] / times[_WITH][key] for key in ("batch", "again")}
    equal = sum(
        int((a == b).all()) for a, b in zip(runs[_WITHOUT][-1]["tokens"], runs[_WITH][-1]["tokens"], strict=True)
    )
    return Section(
        NAME,
        "A swap space",
        f"With a swap space a batch that needs {1 / given.share:.1f} times the pool is {gains['batch']:.2f} times as "
        f"fast, and a prompt that was evicted comes back {gains['again']:.1f} times as fast.",
        [
            *(Figure(f"batch: {name}", of_name["batch"], "s", better="lower") for name, of_name in times.items()),
            *(
                Figure(f"a prompt again: {name}", of_name["again"], "s", better="lower")
                for name, of_name in times.items()
            ),
            Figure("rows with equal tokens", equal, f"of {len(ids)}"),
        ],
        [Table("The last turn", _COLUMNS, [_row(name, of_name[-1]) for name, of_name in runs.items()])],
        notes=[
            f"{len(ids)} rows of {given.prompt} random tokens and {given.new_tokens} new ones; medians of "
            f"{given.repeats} turns, each on an empty pool of {budget:,} bytes, or that and {given.swap_space} of swap "
            "space. The second workload is one new token for each prompt, in a call of its own."
        ],
    )


def _run(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict:
    """Seconds of a call with all rows; then those of a call with each row alone, when all have run."""
    _generate(model, ids[:1, :8], 1)  # Makes the engine.
    elapsed, tokens = _generate(model, ids, new_tokens)
    preemptions = hf_paged.stats(model).preemptions
    for row in ids:
        _generate(model, row[None], 1)
    found = hf_paged.stats(model).prefix_hit_tokens
    again = [_generate(model, row[None], 1)[0] for row in ids]
    stats = hf_paged.stats(model)
    return {
        "batch": elapsed,
        "again": median(again),
        "tokens": tokens,
        "preemptions": preemptions,
        "found": stats.prefix_hit_tokens - found,
        "spilled": stats.spilled_blocks,
        "restored": stats.restored_blocks,
    }


def _row(name: str, run: dict) -> list:
    return [name, run["batch"], run["again"], run["found"], run["preemptions"], run["spilled"], run["restored"]]


def _generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds of one greedy call, and its output."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    began = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return time.perf_counter() - began, output


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
