"""Requests that share a long prefix: `generate` dense, paged without the prefix cache, and paged with it, in turns.

    python evals/prefix.py [--dtype bfloat16] [--requests 16] [--shared 1024] [--own 50] [--new-tokens 32] [--repeats 3]

SmolLM2-135M-Instruct, greedy, text of ShareGPT. First the wall time of one call with all requests, on an empty pool;
then the time to the first token of one request, and of a second one with the same prefix after it.
"""

import argparse
import time
from statistics import median

import torch
from interleave import machine
from prompts import sharegpt_prompts
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer


def requests(tokenizer, count: int, shared: int, own: int) -> torch.Tensor:
    """Token ids ``[count, shared + own]``."""
    prompts = sharegpt_prompts(tokenizer, 200 + count)
    text = [token for prompt in prompts[:200] for token in prompt]
    tails = [(prompt * own)[:own] for prompt in prompts[200:]]
    return torch.tensor([text[:shared] + tail for tail in tails])


def seconds(model, ids: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """The time of one call, and what it returns."""
    start = time.perf_counter()
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return time.perf_counter() - start, output


def wall_times(models, ids: torch.Tensor, new_tokens: int, repeats: int) -> None:
    times, outputs = {name: [] for name in models}, {}
    for _ in range(repeats):
        for name, model in models.items():
            hf_paged.release(model)
            elapsed, outputs[name] = seconds(model, ids, new_tokens)
            times[name].append(elapsed)
    stats = hf_paged.stats(models["prefix cache"])
    found = f"{stats.prefix_hit_tokens} of {ids.numel()} prompt tokens found"
    for name, values in times.items():
        equal = int((outputs[name] == outputs["dense"]).all(dim=1).sum())
        ratio = median(values) / median(times["prefix cache"])
        print(f"  {name:16} {median(values):7.2f} s   prefix cache x{ratio:.2f}   {equal} rows as dense")
    print(f"  {found}; {stats.cached_blocks} blocks of {stats.block_size} tokens cached")


def first_tokens(models, ids: torch.Tensor, repeats: int) -> None:
    times = {"dense": [], "first": [], "second": []}
    paged = models["prefix cache"]
    for _ in range(repeats):
        times["dense"].append(seconds(models["dense"], ids[:1], 1)[0])
        hf_paged.release(paged)
        seconds(paged, ids[:1, -8:], 1)  # Makes the engine.
        for row, name in enumerate(("first", "second")):
            times[name].append(seconds(paged, ids[row : row + 1], 1)[0])
    first, second, dense = (median(times[name]) for name in ("first", "second", "dense"))
    print(f"  time to first token: dense {dense:.3f} s, first call {first:.3f} s, second call {second:.3f} s")
    print(f"  second call x{first / second:.1f} of the first")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--shared", type=int, default=1024)
    parser.add_argument("--own", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ids = requests(load_tokenizer(), arguments.requests, arguments.shared, arguments.own)
    dtype = getattr(torch, arguments.dtype)
    names = {"dense": "sdpa", "no prefix cache": "paged", "prefix cache": "paged"}
    models = {name: load_model(implementation, dtype) for name, implementation in names.items()}
    hf_paged.configure(models["no prefix cache"], hf_paged.PagedConfig(prefix_cache=False))
    for model in models.values():
        seconds(model, ids[:2, -20:], 4)  # Warms up.
    print(f"{machine()}, {arguments.dtype}")
    print(f"{len(ids)} requests, {arguments.shared} tokens shared, {arguments.own} own, {arguments.new_tokens} new")
    wall_times(models, ids, arguments.new_tokens, arguments.repeats)
    first_tokens(models, ids, arguments.repeats)


if __name__ == "__main__":
    main()
