"""Timed calls of ``generate``: whole ones, and the steps inside them."""

import functools
from collections.abc import Callable
from statistics import median

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.timing import seconds_of

GREEDY = {"do_sample": False}


def greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options) -> torch.Tensor:
    """Generate greedily, all rows to the end: ``[rows, tokens + new_tokens]``."""
    return model.generate(ids, max_new_tokens=new_tokens, **GREEDY, **options)


def step_ms(context: Context, generate: Callable[[int], object], few: int, many: int, repeats: int) -> float:
    """Median milliseconds of a decode step: the difference of two calls that differ in their new tokens alone.

    Parameters
    ----------
    generate : callable
        Takes the number of new tokens.
    """
    found = []
    for _ in range(repeats):
        short = seconds_of(context, functools.partial(generate, few))
        long = seconds_of(context, functools.partial(generate, many))
        found.append((long - short) / (many - few) * 1e3)
    return median(found)


def dense_from_cache(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[int], object]:
    """Calls of dense `generate` on a dynamic cache that holds all but the last token already, with random states.

    So its decode steps can be timed at batches whose dense prefill would take minutes, or more memory than there is.

    Parameters
    ----------
    ids : torch.Tensor
        ``[rows, tokens]``
    """
    config = model.config
    shape = (len(ids), config.num_key_value_heads, ids.shape[1] - 1, config.head_dim)
    mask = torch.ones_like(ids)

    def generate(new_tokens: int) -> torch.Tensor:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, dtype=model.dtype, device=ids.device) for _ in "kv"), layer)
        return greedy(model, ids, new_tokens, attention_mask=mask, **{CACHE_ARGUMENT: cache})

    return generate
