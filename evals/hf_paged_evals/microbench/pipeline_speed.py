"""`pipeline("text-generation")` over ShareGPT prompts with its default arguments: stock at several batch sizes and
paged, in turns of one run; and how far the prompts were read when the first result came.

    python evals/pipeline_speed.py [--dtype bfloat16] [--prompts 64] [--new-tokens 64] [--batch-size 1 ...]

SmolLM2-135M-Instruct. The pipeline's default is to sample; nobody seeds torch here. Every contender first generates
from other prompts. Prints seconds, ratios, and the longest wait between two results of the paged one.
"""

import argparse
import statistics
import time

import torch
from interleave import machine
from prompts import sharegpt_prompts
from transformers import pipeline
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer


def contenders(models, tokenizer, batch_sizes, new_tokens):
    """Pipelines by name, and the batch size that each is called with; None: the default."""
    pipes = {
        name: pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=new_tokens)
        for name, model in models.items()
    }
    found = {
        f"stock, batch_size {size}": (pipes["sdpa"], {"batch_size": size} if size > 1 else {}) for size in batch_sizes
    }
    return {**found, "paged": (pipes["paged"], {})}


def timed(pipe, options, prompts) -> tuple[float, float, int, float]:
    """Seconds in all and until the first result, prompts read by then, and the longest wait between results."""
    read, at = 0, []

    def arriving():
        nonlocal read
        for prompt in prompts:
            read += 1
            yield prompt

    start = time.perf_counter()
    for number, _ in enumerate(pipe(arriving(), **options)):
        at.append(time.perf_counter() - start)
        if number == 0:
            read_first = read
    waits = [later - earlier for earlier, later in zip(at, at[1:])]
    return at[-1], at[0], read_first, max(waits, default=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, action="append", help="default: 1, 4, 8, 16 and 32")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer()
    ids = sharegpt_prompts(tokenizer, arguments.prompts + 2)
    texts = [tokenizer.decode(prompt) for prompt in ids]
    warm, prompts = texts[-2:], texts[:-2]
    models = {name: load_model(name, getattr(torch, arguments.dtype)) for name in ("sdpa", "paged")}
    runs = contenders(models, tokenizer, arguments.batch_size or [1, 4, 8, 16, 32], arguments.new_tokens)
    found = {name: [] for name in runs}
    for turn in range(arguments.repeats + 1):
        for name, (pipe, options) in runs.items():
            hf_paged.release(models["paged"])
            result = timed(pipe, options, prompts if turn else warm)
            if turn:
                found[name].append(result)
                print(f"turn {turn}, {name}: {result[0]:.1f} s", flush=True)
    print(f"{machine()}, {arguments.dtype}, {len(prompts)} prompts of {sum(map(len, ids[:-2]))} tokens")
    seconds = {name: statistics.median(total for total, *_ in results) for name, results in found.items()}
    for name, total in seconds.items():
        _, first, read, wait = found[name][-1]
        print(
            f"  {name:22} {total:7.1f} s   paged x{total / seconds['paged']:.2f}   first result after {first:.1f} s, "
            f"{read} of {len(prompts)} prompts read; longest wait after that {wait:.1f} s"
        )


if __name__ == "__main__":
    main()
