"""The packed loop: rows queue, are preempted and run with those of other calls, and their tokens do not tell."""

import re

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged.attention import paged_attention
from hf_paged.reasons import Reason
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare, pair, watch_steps

both_ways = pytest.mark.usefixtures("is_ahead")


def preemptions(model) -> int:
    return hf_paged.stats(model).preemptions


@both_ways
@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_rows_at_different_steps(name, options):
    compare(pair(name=name), zoo.prompts([13, 4, 30, 9, 21, 1]), **options)


@both_ways
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_a_batch_larger_than_the_pool_queues_and_is_preempted(options):
    models = pair(blocks=18)
    compare(models, zoo.prompts([13, 4, 30, 9, 21, 1] * 4), **options)
    assert preemptions(models[1]) > 0
    assert hf_paged.stats(models[1]).total_blocks == 18, "the budget was exceeded"


PROCESSORS = {
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 7, "exponential_decay_length_penalty": (5, 1.2)},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8, 9], "begin_suppress_tokens": [10]},
    "nucleus": {"top_p": 0.8, "min_p": 0.01, "renormalize_logits": True},
    "typical": {"typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "remove_invalid_values": True},
    "several_ends": {"eos_token_id": [2, 11, 12, 13]},
    "no_end": {"eos_token_id": None},
    "returned": {"num_return_sequences": 3},
}


@both_ways
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_and_criteria_of_transformers(case, sample):
    options = {**PROCESSORS[case], **(SAMPLE if sample else {})}
    if case == "returned" and not sample:
        pytest.raises(ValueError, zoo.pair("llama")[0].generate, **zoo.prompts([4]), **options)
        return
    models, prompts = pair(blocks=40), zoo.prompts([13, 4, 30, 9, 21, 1])
    try:
        compare(models, prompts, **options)
    except RuntimeError as error:  # Older versions compute infinite scores here, from which no token can be sampled.
        for model in models:
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                model.generate(**prompts, **{**LENGTHS, **options})
        assert sample and "probability tensor contains either" in str(error)


def test_equal_prompts_are_prefilled_once(monkeypatch):
    models = pair(token_budget=512)
    compare(models, zoo.prompts([8], seed=1), **SAMPLE)
    ran = watch_steps(monkeypatch, lambda inputs: inputs.input_ids.numel())
    compare(models, zoo.prompts([30]), num_return_sequences=8, min_new_tokens=20, **SAMPLE)
    assert ran[0] == 30 and set(ran[1:]) == {8}


def test_pads_and_finished_rows_are_not_computed(monkeypatch):
    models = pair(token_budget=512)
    compare(models, zoo.prompts([8], seed=1))
    ran = watch_steps(monkeypatch, lambda inputs: inputs.input_ids.numel())
    inputs = zoo.prompts([30, 5, 1])
    output = compare(models, inputs)
    generated = [row[30:].tolist() for row in output]
    lengths = [row.index(2) + 1 if 2 in row else len(row) for row in generated]
    # The last token of a row is sampled and never run.
    assert sum(ran) == 36 + sum(lengths) - len(lengths)


@both_ways
def test_a_row_that_outgrows_the_pool_raises_after_its_siblings_and_their_tokens_are_kept():
    dense, paged = pair(blocks=10)
    inputs = zoo.prompts([30, 5, 8])
    expected = dense.generate(**inputs, **LENGTHS, min_new_tokens=20)
    with pytest.raises(
        hf_paged.OutOfBlocksError, match=r"needs 11 blocks, \d+ of 10 are free: .*raise memory_budget"
    ) as caught:
        paged.generate(**inputs, **LENGTHS, min_new_tokens=20)
    assert torch.equal(caught.value.sequences[1:], expected[1:])
    assert hf_paged.stats(paged).used_blocks == 0
    compare((dense, paged), zoo.prompts([5, 8]))


@both_ways
def test_a_prompt_that_can_never_fit():
    _, paged = pair(blocks=4)
    with pytest.raises(hf_paged.OutOfBlocksError, match="needs 8 blocks, 4 of 4 are free"):
        paged.generate(**zoo.prompts([30]), **LENGTHS)


class Backwards(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return -scores


FALLBACKS = {
    "a processor may look at other rows: Backwards": {"logits_processor": LogitsProcessorList([Backwards()])},
    "the cache or the scores of several": {"return_dict_in_generate": True},
    "the padding is not on the left": {"attention_mask": torch.tensor([[1] * 7 + [0] * 2, [1] * 9])},
    "the call has no cache": {"use_cache": False},
    "position_ids are not those of the attention mask": {"position_ids": torch.arange(3, 12)[None].expand(2, -1)},
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_cannot_be_packed_runs_the_original_loop_and_is_counted(reason):
    dense, paged = pair()
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    inputs = {**zoo.prompts([9, 9]), **FALLBACKS[reason]}
    expected, got = (model.generate(**inputs, **LENGTHS) for model in (dense, paged))
    assert torch.equal(getattr(expected, "sequences", expected), getattr(got, "sequences", got))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and list(stats.fallbacks.values()) == [1]
    assert next(iter(stats.fallbacks)).startswith(reason)
    del expected, got


def test_a_model_whose_rope_depends_on_the_forward_is_not_packed():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = zoo.build("llama", "paged", rope_parameters=rope)
    model.generate(**zoo.prompts([9, 3]), **LENGTHS)
    assert list(hf_paged.stats(model).fallbacks) == ["the rotary frequencies depend on the whole forward"]


def test_a_model_that_is_changed_after_its_first_call_runs_the_original_loop(monkeypatch):
    dense, paged = pair()
    inputs = zoo.prompts([9, 3])
    paged.generate(**inputs, **LENGTHS)
    monkeypatch.setattr(paged_attention, "_kernel_obstacle", lambda *args: Reason.OUTPUT_ATTENTIONS)
    assert torch.equal(paged.generate(**inputs, **LENGTHS), dense.generate(**inputs, **LENGTHS))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and stats.fallbacks == {"attention weights are returned": 1}
