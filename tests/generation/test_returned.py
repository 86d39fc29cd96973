"""Packed calls leave more than tokens behind: scores, logits, and a cache to go on from."""

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from support import zoo
from support.packing import LENGTHS, SAMPLE, pair


def packed_alone(model) -> bool:
    stats = hf_paged.stats(model)
    return stats.packed_calls == 1 and not stats.fallbacks


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_returned_scores_logits_and_cache_of_a_lone_row(name, options):
    models = dense, paged = pair(name=name)
    hf_paged.release(paged)
    inputs, outputs = zoo.prompts([11]), []
    for model in models:
        torch.manual_seed(0)
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        outputs.append(model.generate(**inputs, **LENGTHS, **options, **wanted))
    expected, got = outputs
    assert packed_alone(paged)
    assert type(got) is type(expected) and got.keys() == expected.keys()
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in ((got.scores, expected.scores), (got.logits, expected.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-3, atol=1e-3)
    caches = got.past_key_values, expected.past_key_values
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == got.sequences.shape[1] - 1
    for layers in zip(*(cache.layers for cache in caches)):
        torch.testing.assert_close(layers[0].keys, layers[1].keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layers[0].values, layers[1].values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_a_conversation_over_the_callers_own_cache(name):
    models = pair(name=name)
    hf_paged.release(models[1])
    lengths, rows = {**LENGTHS, "eos_token_id": None}, []
    for model in models:
        cache, ids, row = DynamicCache(config=model.config), zoo.prompts([9])["input_ids"], []
        for turn in (5, 6, 7):
            ids = model.generate(ids, past_key_values=cache, **lengths)
            assert cache.get_seq_length() == ids.shape[1] - 1
            row.append(ids)
            ids = torch.cat([ids, torch.full((1, 3), turn)], dim=1)
        rows.append(row)
    assert all(torch.equal(*turns) for turns in zip(*rows))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1
    assert stats.fallbacks == {"the cache holds tokens already": 2}
    assert stats.page_reads


@pytest.mark.parametrize("lengths", [[9, 4], [9, 9]], ids=["padded", "several"])
def test_a_returned_rectangle_is_that_of_the_original_loop(lengths):
    models = pair()
    hf_paged.release(models[1])
    outputs = [model.generate(**zoo.prompts(lengths), **LENGTHS, return_dict_in_generate=True) for model in models]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].past_key_values.get_seq_length() == outputs[1].past_key_values.get_seq_length()
    assert sum(hf_paged.stats(models[1]).fallbacks.values()) == 1


def test_a_cache_that_was_given_up_returns_its_blocks():
    _, paged = pair()
    hf_paged.release(paged)
    cache = DynamicCache(config=paged.config)
    paged.generate(**zoo.prompts([9]), past_key_values=cache, **LENGTHS)
    assert hf_paged.stats(paged).used_blocks > 0
    del cache
    assert hf_paged.stats(paged).used_blocks == 0


def test_a_cropped_cache_does_not_write_into_blocks_that_others_will_find():
    dense, paged = pair()
    hf_paged.release(paged)
    ids = zoo.prompts([24])["input_ids"]
    cache = DynamicCache(config=paged.config)
    paged.generate(ids, past_key_values=cache, **LENGTHS)
    cache.crop(13 - cache.get_seq_length())
    other = torch.cat([ids[:, :13], torch.full((1, 12), 9)], dim=1)
    got = paged.generate(other, past_key_values=cache, **LENGTHS)
    assert torch.equal(got, dense.generate(other, **LENGTHS))
    hits = hf_paged.stats(paged).prefix_hit_tokens
    assert torch.equal(paged.generate(ids, **LENGTHS), dense.generate(ids, **LENGTHS))
    assert hf_paged.stats(paged).prefix_hit_tokens > hits


def test_a_cancelled_call_leaves_the_cache_what_it_had():
    _, paged = pair()
    hf_paged.release(paged)
    cache, cancellation = DynamicCache(config=paged.config), hf_paged.Cancellation()

    class Streamer:
        count = 0

        def put(self, tokens):
            self.count += 1
            if self.count == 5:
                cancellation.cancel()

        def end(self):
            pass

    ids = paged.generate(
        **zoo.prompts([9]),
        **{**LENGTHS, "eos_token_id": None},
        past_key_values=cache,
        streamer=Streamer(),
        stopping_criteria=[cancellation],
    )
    assert hf_paged.stats(paged).packed_calls == 1
    assert 9 < ids.shape[1] < 9 + LENGTHS["max_new_tokens"]
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("owner", ["released pool", "other windows"])
def test_an_empty_cache_that_is_not_of_this_pool_is_filled_by_the_original_loop(owner):
    dense, paged = pair(name="gemma3_text")
    inputs = zoo.prompts([11])
    if owner == "released pool":
        cache = DynamicCache(config=paged.config)
        paged.generate(**inputs, **LENGTHS, past_key_values=cache)
        cache.reset()
    else:
        cache = DynamicCache(config=pair()[1].config)
    hf_paged.release(paged)
    expected = DynamicCache(config=dense.config if owner == "released pool" else pair()[0].config)
    want = dense.generate(**inputs, **LENGTHS, past_key_values=expected)
    got = paged.generate(**inputs, **LENGTHS, past_key_values=cache)
    assert torch.equal(got, want)
    assert cache.get_seq_length() == expected.get_seq_length()
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 0 and sum(stats.fallbacks.values()) == 1
