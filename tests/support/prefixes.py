"""Prompts that begin alike, and models whose prefix cache a test may fill."""

import hf_paged
from hf_paged import PagedConfig
from support import zoo


def prompts(lengths, shared=24, seed=0):
    """Left-padded prompts that all begin with the same tokens; those after them depend on `seed`."""
    inputs, first = zoo.prompts(lengths, seed=seed + 1), zoo.prompts([shared])["input_ids"][0]
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        inputs["input_ids"][row, start : start + shared] = first[:length]
    return inputs


def own_pair(name="llama"):
    """A pair of models that a test may change."""
    dense, paged = zoo.build(name, zoo.dense_implementation(name)), zoo.build(name, "paged")
    hf_paged.configure(paged, PagedConfig(block_size=4))
    return dense, paged


def found(model) -> int:
    return hf_paged.stats(model).prefix_hit_tokens
