"""Calls of several threads at once against the same calls one after another: wall time and equality.

    python evals/threads.py [--threads 8] [--new-tokens 64] [--repeats 3] [--dtype bfloat16]

SmolLM2-135M-Instruct, one ShareGPT prompt a call, greedy; the pool is released before each timed run.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from interleave import machine
from prompts import sharegpt_prompts
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    prompts = [torch.tensor([ids]) for ids in sharegpt_prompts(load_tokenizer(), arguments.threads + 1)]
    warm, prompts = prompts[-1:], prompts[:-1]
    models = {name: load_model(name, getattr(torch, arguments.dtype)) for name in ("sdpa", "paged")}

    def generate(name, ids):
        return models[name].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.new_tokens, do_sample=False
        )

    def at_once(name, prompts):
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda ids: generate(name, ids), prompts))

    runs = {
        "dense, one after another": lambda prompts: [generate("sdpa", ids) for ids in prompts],
        "paged, one after another": lambda prompts: [generate("paged", ids) for ids in prompts],
        "paged, all at once": lambda prompts: at_once("paged", prompts),
    }
    seconds, rows = {name: [] for name in runs}, {}
    for turn in range(arguments.repeats + 1):
        for name, run in runs.items():
            hf_paged.release(models["paged"])
            start = time.perf_counter()
            rows[name] = run(prompts if turn else warm)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{machine()}, {arguments.dtype}, {arguments.threads} calls, prompts of {sum(ids.numel() for ids in prompts)}"
    )
    least = statistics.median(seconds["paged, all at once"])
    for name, times in seconds.items():
        equal = sum(torch.equal(*pair) for pair in zip(rows[name], rows["dense, one after another"]))
        median = statistics.median(times)
        print(f"  {name:25} {median:6.2f} s   x{median / least:.2f}   {equal} of {len(prompts)} rows equal dense")


if __name__ == "__main__":
    main()
