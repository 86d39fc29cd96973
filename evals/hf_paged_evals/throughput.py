"""Generated tokens a second of `generate` over ShareGPT prompts: dense at several batch sizes, transformers' own
continuous batching, and paged with and without prepacked weights, in turns of one run.

    python evals/throughput.py [--dtype bfloat16] [--prompts 32] [--new-tokens 128] [--repeats 3] [--dense-batch 8]

Greedy, SmolLM2-135M-Instruct. Every contender first generates from other prompts; the pool is released before each
timed run. Prints medians, ratios, and how many rows equal those of dense at batch 1.
"""

import argparse
import functools
import statistics
import time

import torch
from interleave import machine
from prompts import sharegpt_prompts
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer


def padded(tokenizer, prompts, batch: int, generate) -> list[list[int]]:
    """Generate batch by batch from left-padded prompts; the new tokens of each row up to its end."""
    rows = []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer.pad({"input_ids": prompts[first : first + batch]}, return_tensors="pt", padding_side="left")
        output = generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        rows += [_until_end(row, tokenizer.eos_token_id) for row in output]
    return rows


def _until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


def contenders(models, tokenizer, dense_batches, options):
    """Functions from prompts to new tokens, by name."""
    found = {}
    for batch in dense_batches:
        found[f"dense, batch {batch}"] = lambda prompts, batch=batch: padded(
            tokenizer, prompts, batch, lambda **inputs: models["sdpa"].generate(**inputs, **options)
        )

    def batched(prompts):
        config = ContinuousBatchingConfig(
            num_blocks=100, max_batch_tokens=512, max_memory_percent=0.5, max_requests_per_batch=32
        )
        wanted = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options)
        outputs = models["batched"].generate_batch(prompts, wanted, config)
        rows = [outputs[f"req_{number}"].generated_tokens for number in range(len(prompts))]
        return [_until_end(row, tokenizer.eos_token_id) for row in rows]

    def paged(prompts, name):
        return padded(tokenizer, prompts, len(prompts), lambda **inputs: models[name].generate(**inputs, **options))

    found["generate_batch"] = batched
    return {**found, **{name: functools.partial(paged, name=name) for name in ("paged", "paged, prepacked")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-batch", type=int, action="append", help="default: 1, 8 and 32")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer()
    prompts = sharegpt_prompts(tokenizer, arguments.prompts + 2)
    warm, prompts = prompts[-2:], prompts[:-2]
    dtype = getattr(torch, arguments.dtype)
    implementations = {"sdpa": "sdpa", "batched": "sdpa", "paged": "paged", "paged, prepacked": "paged"}
    models = {name: load_model(implementation, dtype) for name, implementation in implementations.items()}
    # A turn repeats the prompts of the one before, and must not find what that one stored.
    hf_paged.configure(models["paged"], hf_paged.PagedConfig(prefix_cache=False))
    hf_paged.configure(models["paged, prepacked"], hf_paged.PagedConfig(prefix_cache=False, prepack_weights=True))
    options = {"max_new_tokens": arguments.new_tokens, "do_sample": False}
    runs = contenders(models, tokenizer, arguments.dense_batch or [1, 8, 32], options)
    seconds, rows = {name: [] for name in runs}, {}
    for turn in range(arguments.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            rows[name] = run(prompts if turn else warm)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    print(f"{machine()}, {arguments.dtype}, {len(prompts)} prompts of {sum(map(len, prompts))} tokens")
    rates = {name: sum(map(len, rows[name])) / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(runs))
    for name, rate in rates.items():
        equal = sum(a == b for a, b in zip(rows[name], rows[first]))
        print(f"  {name:18} {rate:7.1f} tokens/s   paged x{rates['paged'] / rate:.2f}   {equal} rows as {first}")


if __name__ == "__main__":
    main()
