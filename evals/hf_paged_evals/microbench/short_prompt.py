"""One short prompt: `generate` dense and paged in turns, where pages have nothing to win.

python evals/short_prompt.py [--dtype bfloat16] [--prompt 32] [--new-tokens 64] [--repeats 15]
"""

import argparse

import torch
from interleave import machine, median, take_turns
from transformers.utils import logging

from hf_paged.cli.demo_model import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ids = torch.randint(100, 40000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    models = {name: load_model(name, getattr(torch, arguments.dtype)) for name in ("sdpa", "paged")}
    count = arguments.new_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    mask = torch.ones_like(ids)
    runs = {
        name: lambda turn, model=model: model.generate(ids, attention_mask=mask, **options)
        for name, model in models.items()
    }
    medians = {name: median(times) for name, times in take_turns(runs, arguments.repeats).items()}
    print(machine())
    print(f"dense {medians['sdpa']:.3f} s, paged {medians['paged']:.3f} s: x{medians['sdpa'] / medians['paged']:.3f}")


if __name__ == "__main__":
    main()
