"""Reasons: each is counted, with or without a pool, and told once, with its remedy."""

import logging

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged import reasons
from hf_paged.compat.generate_frame import names_passed_to_generate
from hf_paged.reasons import Reason
from hf_paged_integrations.transformers import eligibility
from support import zoo
from support.packing import LENGTHS


@pytest.fixture
def told(monkeypatch, caplog):
    """(level, message) of what is logged, as in a new process, about a word."""
    monkeypatch.setattr(reasons, "_told", set())
    caplog.set_level(logging.INFO, logger=reasons.logger.name)
    return lambda word: [(record.levelno, record.message) for record in caplog.records if word in record.message]


def test_every_reason_has_a_text_of_its_own_and_a_remedy():
    texts = [reason.text for reason in Reason]
    assert len(set(texts)) == len(texts) and all(texts)
    assert all(reason.remedy and not reason.remedy.endswith(".") for reason in Reason)
    named = Reason.PROCESSOR.of("Backwards")
    assert named.text == str(named) == "a processor may look at other rows: Backwards"
    assert named.remedy == Reason.PROCESSOR.remedy and named.is_expected


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_first_call_without_pages_is_counted(options):
    model = zoo.build("llama", "paged")
    for number in (1, 2):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS, **options)
        stats = hf_paged.stats(model)
        assert stats.total_blocks == 0
        assert stats.fallbacks == {"the call has no cache, or one that is not transformers' DynamicCache": number}


def test_training_and_autocast_are_two_reasons():
    model = zoo.build("gpt2", "paged", resid_pdrop=0.1).train()
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    training = "the model draws random numbers in training mode (Dropout(p=0.1, inplace=False))"
    assert hf_paged.stats(model).fallbacks == {training: 1}
    model.eval()
    with torch.autocast("cpu"):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert hf_paged.stats(model).fallbacks == {training: 1, "autocast is on": 1}


@pytest.mark.parametrize("forget", ["release", "configure"])
def test_counts_live_until_the_pool_is_let_go_of(forget):
    model = zoo.build("llama", "paged")
    model.generate(**zoo.prompts([9, 4]), **LENGTHS, use_cache=False)
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    stats = hf_paged.stats(model)
    assert stats.packed_calls == 1 and sum(stats.fallbacks.values()) == 1
    if forget == "release":
        hf_paged.release(model)
    else:
        hf_paged.configure(model, hf_paged.PagedConfig())
    stats = hf_paged.stats(model)
    assert stats.packed_calls == 0 and not stats.fallbacks


class Backwards(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return -scores


def test_an_expected_fallback_is_told_once_as_information(told):
    model = zoo.build("llama", "paged")
    for _ in range(2):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS, logits_processor=LogitsProcessorList([Backwards()]))
    ((level, message),) = told("own loop")
    assert level == logging.INFO
    assert "because a processor may look at other rows: Backwards. Remedy: use transformers' own" in message


def test_an_unexpected_fallback_warns_once_with_its_remedy(told):
    model = zoo.build("llama", "paged")
    model.model.norm.register_forward_hook(lambda module, args, output: output + 100 * output.mean(1, keepdim=True))
    for _ in range(2):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    ((level, message),) = told("own loop")
    assert level == logging.WARNING
    assert "because the model mixes the rows of a packed forward. Remedy: load the model with" in message


def embedded(model) -> dict:
    """Prompts as embeddings, which the caller passes."""
    inputs = zoo.prompts([9, 4])
    return {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }


def test_inputs_that_the_caller_passes_are_expected(told):
    model = zoo.build("llama", "paged")
    model.generate(**embedded(model), **LENGTHS)
    assert hf_paged.stats(model).fallbacks == {"the model is given inputs besides tokens: inputs_embeds": 1}
    ((level, message),) = told("own loop")
    assert level == logging.INFO and "Remedy: leave them out where" in message


def test_inputs_that_transformers_adds_by_itself_warn(told, monkeypatch):
    """As after an upgrade that brings or renames an argument: every call would fall back, and only a counter say so."""
    monkeypatch.setattr(eligibility, "_MODEL_ARGUMENTS", eligibility._MODEL_ARGUMENTS - {"logits_to_keep"})
    model = zoo.build("llama", "paged")
    for _ in range(2):
        model.generate(**embedded(model), **LENGTHS)
    text = "transformers itself adds inputs that hf_paged does not know: logits_to_keep"
    assert hf_paged.stats(model).fallbacks == {text: 2}
    ((level, message),) = told("own loop")
    assert level == logging.WARNING
    assert f"because {text}. Remedy: install a transformers that hf_paged was tested with" in message


def test_inputs_of_a_loop_that_is_called_by_itself_are_its_callers(monkeypatch):
    assert names_passed_to_generate() is None
    monkeypatch.setattr(eligibility, "names_passed_to_generate", lambda: None)
    assert eligibility._why_not_these_extra(["cache"]).is_expected


def test_the_innermost_generate_is_asked(monkeypatch):
    """A streamer, a processor or a model may call generate from inside another call."""
    seen, outer = [], zoo.build("llama", "sdpa")

    def note(ids, scores):
        seen.append(names_passed_to_generate())
        return scores

    def inside(ids, scores):
        outer.generate(**zoo.prompts([3]), **{**LENGTHS, "max_new_tokens": 1}, logits_processor=[note])
        return note(ids, scores)

    outer.generate(zoo.prompts([3])["input_ids"], max_new_tokens=1, logits_processor=[inside])
    assert [{"attention_mask", "input_ids"} & names for names in seen] == [{"attention_mask", "input_ids"}, set()]


def test_gathers_are_told_once_each(told):
    models = zoo.build("llama", "paged"), zoo.build("bloom", "paged")
    cache = DynamicCache(config=models[0].config)
    with torch.no_grad():
        models[0](zoo.prompts([9])["input_ids"], past_key_values=cache)
    for _ in range(2):
        assert cache.layers[0].keys.shape == (1, 2, 9, 16)
        models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
    gathered = dict(told("gathered"))
    assert len(told("gathered")) == len(gathered) == 2
    assert "the cache's keys or values are read" in gathered[logging.INFO]
    assert "the model applies aten.view to them" in gathered[logging.WARNING]
    assert sum(hf_paged.stats(models[1]).gathers.values()) > 1, "each is counted"
