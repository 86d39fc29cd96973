"""Concurrent asyncio streams against one at a time: time to the first token and between tokens.

Greedy, ragged prompts; each stream reads its tokens in a task of its own. Medians and 99th percentiles are over all
streams of all turns.
"""

import argparse
import asyncio
import sys
import time

import numpy
from transformers import PreTrainedModel

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_dataset, add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "async_latency"
QUICK = {"streams": 3, "new_tokens": 4, "max_prompt": 64, "repeats": 1}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    add_dataset(parser)
    parser.add_argument("--streams", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most (default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Latencies of the streams one at a time and at once, in turns."""
    options = model_options(given, NAME)
    prompts = workloads.ragged(options, given.streams, given.max_prompt)
    model = load_model(options, "paged")
    arguments = {"max_new_tokens": given.new_tokens, "do_sample": False}
    streams: dict[str, list[list[float]]] = {"one at a time": [], "all at once": []}
    for _ in range(given.repeats):
        for name, times in streams.items():
            times += asyncio.run(_turn(model, prompts, arguments, name == "all at once"))
    figures = []
    for name, times in streams.items():
        first = [moments[0] for moments in times]
        between = [later - earlier for moments in times for earlier, later in zip(moments, moments[1:])]
        for what, values in (("first token", first), ("between tokens", between)):
            for kind, percent in (("median", 50), ("p99", 99)):
                value = float(1000 * numpy.percentile(values, percent))
                figures.append(Figure(f"{name}: {what}, {kind}", value, "ms", better="lower"))
    return Section(
        NAME,
        "Asyncio streams",
        f"{len(prompts)} streams, one at a time and all at once.",
        figures,
        notes=[f"Prompts of {sum(map(len, prompts))} tokens in all; {given.repeats} turns."],
    )


async def _turn(model: PreTrainedModel, prompts: list[list[int]], arguments: dict, at_once: bool) -> list[list[float]]:
    """The times of every stream of one turn, on a new pool."""
    hf_paged.release(model)
    async with hf_paged.AsyncEngine(model) as engine:
        await _stream(engine, prompts[0], {**arguments, "max_new_tokens": 2})  # Makes the pool.
        if at_once:
            return await asyncio.gather(*(_stream(engine, prompt, arguments) for prompt in prompts))
        return [await _stream(engine, prompt, arguments) for prompt in prompts]


async def _stream(engine: hf_paged.AsyncEngine, prompt: list[int], arguments: dict) -> list[float]:
    """Seconds from the start of a stream to each of its tokens."""
    began, times = time.perf_counter(), []
    async for _ in engine.stream(prompt, **arguments):
        times.append(time.perf_counter() - began)
    return times


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
