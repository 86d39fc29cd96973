"""Caches in a test's own hands: fill them, continue from them, count their blocks."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import hf_paged
from support import zoo

MODELS = ["llama", "mistral", "gemma3_text"]  # Full attention, a window in every layer, both.
every_cache = pytest.mark.parametrize("models", MODELS, indirect=True)


def prefill(model, ids, mask=None, recording=False):
    """A cache the caller made and filled: stored at once."""
    cache = DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def step(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def assert_same_next(models, caches, rows, positions=1, mask=None):
    """Both caches continue with the same logits."""
    ids = torch.arange(3, 3 + rows * positions).view(rows, positions) % zoo.VOCAB
    logits = [step(model, cache, ids, mask) for model, cache in zip(models, caches)]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)


def used(model) -> int:
    return hf_paged.stats(model).used_blocks


def as_arguments(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


# The dense cache of older versions is no reference for all that it offers.


def dense_may_record_forwards_in_a_row() -> bool:
    """Tell if transformers' own window layer shows as much as it announces, without a crop between forwards."""
    layer, states = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 3, 2)
    layer.activate_past_recording()
    layer.update(states, states)
    announced = layer.get_mask_sizes(3)[0]
    return layer.update(states, states)[0].shape[2] == announced


def end_recording(caches) -> None:
    """Between two forwards of caches that record their past: free it where the dense one could not go on with it."""
    if not dense_may_record_forwards_in_a_row():
        for cache in caches:
            cache.crop(0)


def reset(models, caches) -> None:
    """Reset the dense cache and the paged one; a dense one that keeps zeros and its length is replaced by a new one."""
    for cache in caches:
        cache.reset()
    if caches[0].layers[0].keys is not None:
        caches[0] = DynamicCache(config=models[0].config)
