"""A cache from its birth in a forward to its death: binding to a model, lone forwards, refusals, changes of mind."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import hf_paged
from hf_paged.cache.layers import PagedLayer
from support import zoo
from support.caches import as_arguments, assert_same_next, prefill, step, used


def test_a_lone_forward_stores_nothing_until_its_cache_is_used():
    dense, paged = zoo.pair("llama")
    hf_paged.release(paged)
    ids = zoo.prompts([12, 12])["input_ids"]
    with torch.no_grad():
        outputs = [model(ids) for model in (dense, paged)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert used(paged) == 0
    caches = [output.past_key_values for output in outputs]
    del outputs
    assert caches[1].get_seq_length() == 12
    assert_same_next((dense, paged), caches, 2)
    assert used(paged) > 0
    stats = hf_paged.stats(paged)
    assert stats.page_reads > 0 and not stats.gathers


@pytest.mark.parametrize("use", ["reorder_cache", "batch_repeat_interleave", "crop", "deepcopy"])
def test_the_cache_of_a_lone_forward_can_be_used_like_any(use):
    models = zoo.pair("gemma3_text")
    ids = zoo.prompts([5, 5])["input_ids"]
    caches = []
    for model in models:
        with torch.no_grad():
            cache = model(ids).past_key_values
        if use == "deepcopy":
            cache = copy.deepcopy(cache)
        else:
            getattr(cache, use)({"reorder_cache": torch.tensor([1, 0]), "batch_repeat_interleave": 1, "crop": -2}[use])
        caches.append(cache)
    assert_same_next(models, caches, 2)


def test_two_models_of_one_config_have_two_pools():
    config = zoo.build("llama", "paged").config
    first, second = (LlamaForCausalLM(config).eval() for _ in range(2))
    cache = prefill(first, zoo.prompts([9])["input_ids"])
    assert used(first) > 0 and hf_paged.stats(second).total_blocks == 0
    del cache


def test_a_copied_model_pages_on_its_own():
    model = zoo.build("llama", "paged")
    copied = copy.deepcopy(model)
    cache = prefill(copied, zoo.prompts([9])["input_ids"])
    assert used(copied) > 0 and hf_paged.stats(model).total_blocks == 0
    del cache


def test_other_batch_size_is_refused_in_words():
    paged = zoo.pair("llama")[1]
    cache = prefill(paged, zoo.prompts([9, 9])["input_ids"])
    with pytest.raises(ValueError, match="holds 2 rows and got states for 3"):
        step(paged, cache, torch.full((3, 1), 5))
    del cache


def test_unseen_padding_that_is_shown_later_is_refused_in_words():
    paged = zoo.pair("llama")[1]
    inputs = zoo.prompts([9, 4])
    cache = prefill(paged, **as_arguments(inputs))
    with pytest.raises(hf_paged.UnsupportedError, match="attention_mask of the whole sequence"):
        step(paged, cache, torch.full((2, 1), 5))
    del cache


def test_a_mask_that_hides_stored_tokens_is_obeyed():
    models = zoo.pair("llama")
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 2:6] = 0
    assert_same_next(models, caches, 2, mask=mask)
    assert "the attention mask hides stored tokens" in hf_paged.stats(models[1]).gathers


def test_autocast_after_float32_goes_dense():
    models = zoo.pair("llama")
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    logits = []
    for model, cache in zip(models, caches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(step(model, cache, torch.full((2, 1), 5)).float())
    torch.testing.assert_close(*logits, atol=0.3, rtol=0.1)
    assert used(models[1]) == 0


def test_inference_mode_and_after():
    models = zoo.pair("llama")
    hf_paged.release(models[1])
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = []
    for model in models:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        caches.append(cache)
    assert_same_next(models, caches, 2)


def test_stale_handles_refuse_to_be_read():
    paged = zoo.pair("llama")[1]
    cache = prefill(paged, zoo.prompts([9])["input_ids"])
    original = PagedLayer.update
    handles = []

    def update(self, *args, **kwargs):
        handles.append(original(self, *args, **kwargs))
        return handles[-1]

    PagedLayer.update = update
    try:
        step(paged, cache, torch.tensor([[5]]))
    finally:
        PagedLayer.update = original
    keys, _ = handles[0]
    assert keys.shape == (1, 2, 10, 16) and keys.sum().isfinite()
    step(paged, cache, torch.tensor([[6]]))
    with pytest.raises(RuntimeError, match="after the cache has changed"):
        keys + 1
    handles.clear()
    del keys, cache, _
