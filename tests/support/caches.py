"""Caches in a test's own hands: fill them, continue from them, count their blocks."""

import pytest
import torch
from transformers import DynamicCache

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
