"""Concurrent async streams against one: time to the first token and between tokens.

    python evals/async_latency.py [--dtype bfloat16] [--streams 16] [--new-tokens 64] [--repeats 3]

Greedy, SmolLM2-135M-Instruct, ShareGPT prompts. One stream at a time and all at once, in turns; each stream reads
its tokens in a task of its own. Prints medians and 99th percentiles over all streams of all turns.
"""

import argparse
import asyncio
import time

import torch
from interleave import machine
from prompts import sharegpt_prompts
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer
from hf_paged_integrations.serving.async_engine import AsyncEngine


async def stream(engine: AsyncEngine, prompt: list[int], options: dict) -> tuple[float, list[float]]:
    """Seconds until the first token, and between each two that follow."""
    began = time.perf_counter()
    at = []
    async for _ in engine.stream(prompt, **options):
        at.append(time.perf_counter())
    return at[0] - began, [later - earlier for earlier, later in zip(at, at[1:])]


async def measure(model, prompts: list[list[int]], options: dict, at_once: bool):
    hf_paged.release(model)
    async with AsyncEngine(model) as engine:
        await stream(engine, prompts[0], {**options, "max_new_tokens": 2})  # Makes the pool.
        if at_once:
            return await asyncio.gather(*(stream(engine, prompt, options) for prompt in prompts))
        return [await stream(engine, prompt, options) for prompt in prompts]


def milliseconds(values: list[float]) -> str:
    median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    return f"median {1e3 * median:7.1f} ms, p99 {1e3 * high:7.1f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompts = sharegpt_prompts(load_tokenizer(), arguments.streams)
    model = load_model("paged", getattr(torch, arguments.dtype))
    options = {"max_new_tokens": arguments.new_tokens, "do_sample": False}
    found = {"one stream": [], f"{arguments.streams} streams": []}
    for _ in range(arguments.repeats):
        for at_once, name in enumerate(found):
            found[name] += asyncio.run(measure(model, prompts, options, bool(at_once)))
    print(f"{machine()}, {arguments.dtype}, prompts of {sum(map(len, prompts))} tokens in all")
    for name, results in found.items():
        print(f"  {name:12} first token: {milliseconds([first for first, _ in results])}")
        print(f"  {'':12} between tokens: {milliseconds([gap for _, gaps in results for gap in gaps])}")


if __name__ == "__main__":
    main()
