"""Blocks that can be found, in other hands: returned caches may rewrite them, servers pass the salt on."""

import asyncio
import threading

import pytest
import torch

import hf_paged
from hf_paged.scheduling.cache_salt import current_salt
from hf_paged_integrations.pipelines.prefetch import Prefetch
from hf_paged_integrations.serving.async_engine import AsyncEngine
from support import zoo
from support.packing import LENGTHS, compare, pair


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_returned_cache_that_is_cropped_and_continued_leaves_no_wrong_block(name):
    models, logits = pair(name=name), []
    ids = zoo.prompts([30])["input_ids"]
    for model in models:
        options = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
        cache = model.generate(ids, **options).past_key_values
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids[:, :4], past_key_values=cache)
            cache.crop(-4 - (17 if name == "llama" else 0))  # A window has forgotten what came earlier.
            logits.append(model(ids[:, :8] + 1, past_key_values=cache).logits)
        del cache
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    compare(models, {"input_ids": ids})
    assert hf_paged.stats(models[1]).prefix_hit_tokens == (16 if name == "llama" else 28)


def test_a_server_passes_the_salt_of_each_request_on():
    _, paged = pair()

    async def ask(salt):
        async with AsyncEngine(paged) as engine:
            with hf_paged.cache_salt(salt):
                stream = engine.stream(zoo.prompts([30])["input_ids"], **LENGTHS)
            return [token async for token in stream]

    for salt, expected in [("a", 0), ("b", 0), ("a", 28)]:
        asyncio.run(ask(salt))
        assert hf_paged.stats(paged).prefix_hit_tokens == expected


def test_a_pipeline_that_runs_ahead_passes_the_salt_on():
    with hf_paged.cache_salt("a"):
        items = Prefetch(lambda item, cancellation: current_salt(), iter(range(3)), None, 1, 2, threading.Condition())
        assert list(items) == ["a"] * 3


def test_a_forward_that_was_replaced_finds_nothing_of_before():
    _, paged = pair()
    hf_paged.release(paged)
    inputs = zoo.prompts([40])
    paged.generate(**inputs, **LENGTHS)
    block = paged.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda hidden: 3 * forward(hidden)
    try:
        got = paged.generate(**inputs, **LENGTHS)
        assert hf_paged.stats(paged).prefix_hit_tokens == 0
        hf_paged.release(paged)
        assert torch.equal(got, paged.generate(**inputs, **LENGTHS))
    finally:
        del block.forward
