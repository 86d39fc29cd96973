"""A whole decode step: dense as `generate` runs it, dense with a mask passed, and paged.

The caches are filled with random states, of which the time of a step does not depend, and grow by one token per step,
as they do in `generate`. "prepacked" is the paged step of the first block size with prepacked weights; the KV formats
that are named have that block size, too.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from statistics import median

import torch
from transformers import DynamicCache, PreTrainedModel

import hf_paged
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.execution.prepacked_linear import PrepackedLinears
from hf_paged.memory.kv_format import KV_FORMATS
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "decode_step"
# Rows and tokens per row.
CASES = {"1x4096": (1, 4096), "8x2048": (8, 2048), "32x512": (32, 512), "32x1024": (32, 1024), "8x128": (8, 128)}
QUICK = {"case": ["32x1024", "8x128"], "repeats": 1}


class _CacheIsFilledError(Exception):
    """Ends the forward in which a cache was filled."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, help="rows x context (default: all)")
    parser.add_argument("--block-size", nargs="+", type=int, default=[hf_paged.PagedConfig.block_size], metavar="N")
    parser.add_argument("--kv-dtype", nargs="+", default=[], choices=KV_FORMATS, help="formats to time as well")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns (default: %(default)s)")


def filled_cache(model: PreTrainedModel, batch: int, length: int) -> DynamicCache:
    """A cache of random states, `length` tokens per row. The rows own their blocks; none is shared."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, length, head_dim)
    return cache_of(model, *(torch.randn(shape).to(model.dtype) for _ in range(2)))


def cache_of(model: PreTrainedModel, key: torch.Tensor, value: torch.Tensor) -> DynamicCache:
    """A cache that holds these states, ``[batch, num_kv_heads, length, head_dim]``, in every layer."""
    cache = DynamicCache(config=model.config)

    def fill(module, args, kwargs) -> None:
        for layer in range(model.config.num_hidden_layers):
            cache.update(key, value, layer)
        raise _CacheIsFilledError

    # Pages are filled inside a forward of the model only: this one ends before its first layer.
    hook = model.base_model.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        with contextlib.suppress(_CacheIsFilledError):
            model.base_model(torch.ones(len(key), 1, dtype=torch.long))
    finally:
        hook.remove()
    return cache


def stepper(model: PreTrainedModel, batch: int, length: int, with_mask: bool = False) -> Callable[[int], None]:
    """A function that appends one token to every row of a cache of `length` - 1 tokens."""
    return stepper_over(model, filled_cache(model, batch, length - 1), batch, with_mask)


def stepper_over(
    model: PreTrainedModel, cache: DynamicCache, batch: int, with_mask: bool = False
) -> Callable[[int], None]:
    """A function that appends one token to every row of a cache."""
    tokens = torch.randint(model.config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(0))

    def step(turn: int) -> None:
        # generate passes a mask of ones, which transformers drops; a row of padding makes it keep the mask.
        mask = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long)
        if with_mask:
            mask[:, 0] = 0
        with torch.inference_mode():
            model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})

    return step


def measure(given: argparse.Namespace) -> Section:
    """Median times of a step, by case and contender."""
    torch.manual_seed(given.seed)
    options = model_options(given, NAME)
    dense, paged = load_model(options, "sdpa"), load_model(options, "paged")
    figures, rows = [], []
    for case in given.case:
        contenders = _contenders(dense, paged, CASES[case], given.block_size, given.kv_dtype)
        seconds = {name: median(times) for name, times in take_turns(contenders, given.repeats).items()}
        better = min(seconds["dense"], seconds["dense, mask"])
        for name, time in seconds.items():
            rows.append([case, name, 1000 * time, better / time])
            if "dense" not in name:
                figures.append(Figure(f"{case}: better dense over {name}", better / time, "x", better="higher"))
                default = seconds["dense"] / time
                figures.append(Figure(f"{case}: default dense over {name}", default, "x", better="higher"))
    return Section(
        NAME,
        "A whole decode step",
        f"Median times of a step in {len(given.case)} cases.",
        figures,
        [Table("By case", ["Rows x context", "Contender", "Step (ms)", "Better dense over this (x)"], rows)],
        notes=[f"Medians of {given.repeats} interleaved turns. The default dense step gets a mask that it drops."],
    )


def _contenders(
    dense: PreTrainedModel, paged: PreTrainedModel, case: tuple[int, int], block_sizes: list[int], kv_dtypes: list[str]
) -> dict[str, Callable[[int], None]]:
    contenders = {"dense": stepper(dense, *case), "dense, mask": stepper(dense, *case, with_mask=True)}
    for size in block_sizes:
        hf_paged.configure(paged, hf_paged.PagedConfig(block_size=size))
        contenders[f"paged, block {size}"] = stepper(paged, *case)
    for kv_dtype in kv_dtypes:
        hf_paged.configure(paged, hf_paged.PagedConfig(block_size=block_sizes[0], kv_dtype=kv_dtype))
        contenders[f"paged, {kv_dtype}"] = stepper(paged, *case)
    contenders["prepacked"] = _prepacked(paged, contenders[f"paged, block {block_sizes[0]}"])
    return contenders


def _prepacked(model: PreTrainedModel, step: Callable[[int], None]) -> Callable[[int], None]:
    """`step` with what ``PagedConfig(prepack_weights=True)`` does to the linear layers."""
    linears = PrepackedLinears()

    def run(turn: int) -> None:
        with linears.used_by(model):
            step(turn)

    return run


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
