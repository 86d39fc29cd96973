"""A whole decode step of SmolLM2-135M: dense as `generate` runs it, dense with a mask passed, and paged.

    python evals/bench_step.py [--dtype bfloat16] [--case 32x1024] [--repeats 9] [--block-size 16 --block-size 64]

Medians in milliseconds, interleaved in one run. The caches are filled with random states, of which the time of a
step does not depend, and grow by one token a step, as they do in `generate`. "prepacked" is the paged step of the
first block size with what `PagedConfig(prepack_weights=True)` does to it.
"""

import argparse

import torch
from interleave import machine, median, take_turns
from transformers import DynamicCache
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model
from hf_paged.execution.prepacked_linear import PrepackedLinears
from hf_paged.models import forward_context

CASES = {"1x4096": (1, 4096), "8x2048": (8, 2048), "32x512": (32, 512), "32x1024": (32, 1024), "8x128": (8, 128)}


def filled_cache(model, batch: int, length: int) -> DynamicCache:
    """A cache of random states, `length` tokens a row."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    key, value = (torch.randn(shape).to(model.dtype) for _ in range(2))
    forward_context._enter(model.model, (), {})  # Pages are filled inside a model's call only.
    try:
        for layer in range(config.num_hidden_layers):
            cache.update(key, value, layer)
    finally:
        forward_context._leave(model.model, (), None)
    return cache


def stepper(model, batch: int, length: int, with_mask: bool):
    """A function that appends one token to every row of a cache of `length` - 1 tokens."""
    cache = filled_cache(model, batch, length - 1)
    tokens = torch.randint(100, 40000, (batch, 1), generator=torch.Generator().manual_seed(0))

    def step(turn):
        seen = cache.get_seq_length()
        # generate passes a mask of ones, which transformers drops; a row of padding makes it keep the mask.
        mask = torch.ones(batch, seen + 1, dtype=torch.long)
        if with_mask:
            mask[:, 0] = 0
        with torch.inference_mode():
            model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def prepacked(model, step):
    """`step` with prepacked weights."""
    linears = PrepackedLinears()

    def run(turn):
        with linears.used_by(model):
            step(turn)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"])
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--block-size", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    print(machine())
    for dtype in arguments.dtype or ["bfloat16", "float32"]:
        dense = load_model("sdpa", getattr(torch, dtype))
        paged = load_model("paged", getattr(torch, dtype))
        for case in arguments.case or CASES:
            contenders = {
                "dense": stepper(dense, *CASES[case], False),
                "dense+mask": stepper(dense, *CASES[case], True),
            }
            for size in arguments.block_size or [hf_paged.PagedConfig().block_size]:
                hf_paged.release(paged)
                hf_paged.configure(paged, hf_paged.PagedConfig(block_size=size))
                contenders[f"paged {size}"] = stepper(paged, *CASES[case], False)
                contenders.setdefault("prepacked", prepacked(paged, contenders[f"paged {size}"]))
            medians = {k: median(times) * 1e3 for k, times in take_turns(contenders, arguments.repeats).items()}
            better = min(medians["dense"], medians["dense+mask"])
            columns = " ".join(f"{name} {ms:.1f}" for name, ms in medians.items())
            ratios = " ".join(
                f"x{better / ms:.2f} (x{medians['dense'] / ms:.2f})"
                for name, ms in medians.items()
                if "dense" not in name
            )
            print(f"{dtype:8} {case:7} {columns}  | better dense (default) / paged: {ratios}", flush=True)


if __name__ == "__main__":
    main()
