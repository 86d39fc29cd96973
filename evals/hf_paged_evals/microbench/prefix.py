"""Requests that share a long prefix: `generate` dense, paged without the prefix cache, and paged with it, in turns.

First the wall time of one call with all requests, on an empty pool; then the time to the first token of one request,
and of a second one with the same prefix after it.
"""

import argparse
import sys
import time
from statistics import median

import torch
from transformers import PreTrainedModel

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "prefix"
QUICK = {"requests": 3, "shared": 32, "own": 8, "new_tokens": 3, "repeats": 1}
_DENSE, _WITHOUT, _WITH = "dense", "without prefix cache", "with prefix cache"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    parser.add_argument("--requests", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--shared", type=int, default=1024, help="tokens that all begin with (default: %(default)s)")
    parser.add_argument("--own", type=int, default=50, help="tokens that follow, per request (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of both workloads."""
    options = model_options(given, NAME)
    ids = torch.tensor(workloads.shared_prefix(options, given.requests, given.shared, given.own))
    models = {_DENSE: load_model(options, "sdpa"), _WITHOUT: load_model(options, "paged")}
    models[_WITH] = load_model(options, "paged")
    hf_paged.configure(models[_WITHOUT], hf_paged.PagedConfig(prefix_cache=False))
    for model in models.values():
        _generate(model, ids[:2, -given.own :], 4)  # Warms up.
    seconds, equal = _all_requests(models, ids, given.new_tokens, given.repeats)
    stats = hf_paged.stats(models[_WITH])
    first = _first_tokens(models[_DENSE], models[_WITH], ids, given.repeats)
    gain = seconds[_DENSE] / seconds[_WITH]
    return Section(
        NAME,
        "A shared prefix",
        f"With the prefix cache, all requests take {seconds[_WITH]:.2f} s: {gain:.1f} times faster than dense.",
        [
            *(Figure(f"all requests: {name}", value, "s", better="lower") for name, value in seconds.items()),
            *(Figure(f"first token: {name}", value, "s", better="lower") for name, value in first.items()),
            Figure("prompt tokens found", 100 * stats.prefix_hit_tokens / ids.numel(), "%", better="higher"),
            *(Figure(f"rows equal to dense: {name}", count, f"of {len(ids)}") for name, count in equal.items()),
        ],
        notes=[
            f"{len(ids)} requests of random tokens, {given.shared} shared and {given.own} each, {given.new_tokens} "
            f"new; medians of {given.repeats} turns."
        ],
    )


def _generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds of one greedy call, and its output."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    began = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return time.perf_counter() - began, output


def _all_requests(
    models: dict[str, PreTrainedModel], ids: torch.Tensor, new_tokens: int, repeats: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a call with all rows, and its rows that equal dense; by contender."""
    times: dict[str, list[float]] = {name: [] for name in models}
    outputs = {}
    for _ in range(repeats):
        for name, model in models.items():
            hf_paged.release(model)
            elapsed, outputs[name] = _generate(model, ids, new_tokens)
            times[name].append(elapsed)
    equal = {name: int((outputs[name] == outputs[_DENSE]).all(dim=1).sum()) for name in (_WITHOUT, _WITH)}
    return {name: median(values) for name, values in times.items()}, equal


def _first_tokens(dense: PreTrainedModel, paged: PreTrainedModel, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds until the first token: dense, the first paged call, and the second with the same prefix."""
    times: dict[str, list[float]] = {"dense": [], "first call": [], "second call": []}
    for _ in range(repeats):
        times["dense"].append(_generate(dense, ids[:1], 1)[0])
        hf_paged.release(paged)
        _generate(paged, ids[:1, -8:], 1)  # Makes the engine.
        for row, name in enumerate(("first call", "second call")):
            times[name].append(_generate(paged, ids[row : row + 1], 1)[0])
    return {name: median(values) for name, values in times.items()}


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
