"""Which tokens a cache stores, in how many blocks: padding, sharing, windows."""

import pytest
import torch

import hf_paged
from hf_paged.cache.duplicate_rows import first_equal_rows, have_equal_states
from support import zoo
from support.caches import assert_same_next, every_cache, prefill, step, used


@every_cache
def test_pads_are_not_stored(models):
    hf_paged.release(models[1])
    inputs = zoo.prompts([30, 2, 5])
    cache = prefill(models[1], inputs["input_ids"], inputs["attention_mask"])
    stored = hf_paged.stats(models[1]).tokens_stored
    groups = len({layer.window for layer in cache.layers})
    assert stored <= groups * 37, "37 tokens and 53 pads went in"
    if models[1].config.model_type == "llama":
        assert stored == 37


def test_first_divergent_write_copies_one_block():
    paged = zoo.pair("llama")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([10])["input_ids"])
    cache.batch_repeat_interleave(3)
    assert used(paged) == 3
    step(paged, cache, torch.tensor([[5], [6], [7]]))
    assert used(paged) == 5, "two rows copy the last block, the third keeps it"
    del cache
    assert used(paged) == 0


def test_blocks_that_left_the_window_are_freed():
    paged = zoo.pair("mistral")[1]  # Window of 7.
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([50])["input_ids"])
    assert used(paged) <= 3, "of a long prompt only the window is stored"
    for _ in range(30):
        step(paged, cache, torch.tensor([[5]]))
        assert used(paged) <= 3
    del cache


def test_recorded_past_keeps_blocks_until_crop():
    paged = zoo.pair("mistral")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([50])["input_ids"], recording=True)
    assert used(paged) == 13
    cache.crop(0)
    assert used(paged) <= 3
    del cache


def test_equal_rows_are_stored_once():
    paged = zoo.pair("llama")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    row = zoo.prompts([12])["input_ids"]
    other = row.clone()
    other[0, 3] += 1
    cache = prefill(paged, torch.cat([row, other, row, row]))
    assert used(paged) == 6, "two different prompts of three blocks"
    del cache


def test_rows_with_the_same_tokens_and_other_padding_are_told_apart():
    ids = torch.ones(3, 4, dtype=torch.long)
    valid = torch.ones(3, 4, dtype=torch.bool)
    assert first_equal_rows(ids, None) == first_equal_rows(ids, valid) == [0, 0, 0]
    valid[1, 0] = False
    assert first_equal_rows(ids, valid) == [0, 1, 0]
    assert first_equal_rows(torch.arange(12).view(3, 4), None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_differences_part_rows_in_every_dtype(dtype):
    states = torch.randn(1, 2, 6, 16).to(dtype).repeat(3, 1, 1, 1)
    assert have_equal_states([0, 0, 0], states)
    states[2, 1, 3] *= 1.02
    assert not have_equal_states([0, 0, 0], states) and have_equal_states([0, 0, 2], states)


@every_cache
def test_rows_that_differ_below_the_tokens_are_parted(models):
    """Rows of one prompt run under different adapters: the first layers agree, the next do not."""
    hf_paged.release(models[1])
    ids = zoo.prompts([10])["input_ids"].expand(4, -1)

    def adapt(module, args, output):
        return output + torch.tensor([0.0, 1.0, 0.0, 2.0])[: len(output), None, None]

    hooks = [model.model.layers[0].mlp.register_forward_hook(adapt) for model in models]
    try:
        caches = [prefill(model, ids) for model in models]
        assert_same_next(models, caches, 4)
    finally:
        for hook in hooks:
            hook.remove()
