"""A model that is cast, hooked or configured between two calls is served as what it is now."""

import weakref

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged import PagedConfig
from hf_paged.models import registry
from hf_paged_integrations.transformers import generate, trial
from support import zoo
from support.packing import BLOCK, LENGTHS

MODES = {"greedy": {}, "sample": {"do_sample": True}, "beams": {"num_beams": 3, "num_return_sequences": 2}}


def fresh_pair():
    """Models that a test may change for good."""
    return zoo.build("llama", "sdpa"), zoo.build("llama", "paged")


def both(models, **options):
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(**zoo.prompts([9, 4]), **LENGTHS, **options))
    return outputs


@pytest.mark.parametrize("mode", MODES)
def test_a_cast_model_is_packed_in_its_new_dtype_at_once(mode):
    models = fresh_pair()
    for number, dtype in enumerate((torch.float32, torch.float64, torch.float32), 1):
        for model in models:
            model.to(dtype)
        assert torch.equal(*both(models, **MODES[mode]))
        assert torch.equal(*both(models))
        stats = hf_paged.stats(models[1])
        assert stats.packed_calls == number * (1 if mode == "beams" else 2)
        assert not stats.fallbacks and not stats.gathers
        assert {key.states_dtype for key in registry.pools_under(models[1])[0].groups} == {dtype}


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16], ids=["half", "bfloat16"])
def test_narrow_dtypes_are_packed_too(cast):
    model = fresh_pair()[1]
    both([model])
    cast(model)
    both([model])
    stats = hf_paged.stats(model)
    assert stats.packed_calls == 2 and not stats.fallbacks


def test_the_memory_of_the_old_dtype_goes_and_the_statistics_stay():
    model = fresh_pair()[1]
    both([model])
    old, reads = weakref.ref(registry.pools_under(model)[0]), hf_paged.stats(model).page_reads
    model.double()
    both([model], num_beams=2)
    assert old() is None
    assert hf_paged.stats(model).page_reads > reads and hf_paged.stats(model).packed_calls == 1


def test_caches_that_are_alive_keep_their_dtype():
    dense, paged = fresh_pair()
    ids = zoo.prompts([9])["input_ids"]
    caches = [DynamicCache(config=model.config) for model in (dense, paged)]
    for model, cache in zip((dense, paged), caches):
        with torch.no_grad():
            model(ids, past_key_values=cache)
    both([paged.double()])
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    both([paged.float()])
    longer = torch.cat([ids, ids], dim=1)
    options = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 5}
    outputs = [model.generate(longer, past_key_values=cache, **options) for model, cache in zip((dense, paged), caches)]
    assert torch.equal(*outputs)


class Casts:
    """A streamer that casts the model at the third token."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def put(self, tokens):
        self.count += 1
        if self.count == 4:
            self.model.double()

    def end(self):
        pass


def test_a_call_under_way_ends_with_a_sentence_and_the_next_one_is_right():
    dense, paged = fresh_pair()
    prompt = zoo.prompts([9])
    with pytest.raises(hf_paged.UnsupportedError, match="was changed while it generated: .*dtype or device.*again"):
        paged.generate(**prompt, **LENGTHS, streamer=Casts(paged))
    assert torch.equal(*both((dense.double(), paged)))
    assert hf_paged.stats(paged).packed_calls == 1


def casts_states(model) -> list:
    """Let a model compute its attention in float64; the handles of the hooks that do it."""
    handles = []
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            handles.append(projection.register_forward_hook(lambda module, args, output: output.double()))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0].float(),)))
    return handles


def test_a_dtype_that_no_parameter_shows():
    """Some quantised layers compute in a dtype that is an attribute of theirs."""
    models = fresh_pair()
    assert torch.equal(*both(models))
    for model in models:
        casts_states(model)
    for _ in range(2):
        assert torch.equal(*both(models))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 3 and not stats.fallbacks


def test_pages_of_another_dtype_do_not_hinder_the_first_packed_call():
    models = fresh_pair()
    for model in models:
        handles = casts_states(model)
        both([model], num_beams=2)
        for handle in handles:
            handle.remove()
    assert torch.equal(*both(models))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and stats.page_reads > 0
    assert [key.states_dtype for key in registry.pools_under(models[1])[0].groups] == [torch.float32]


def test_a_forward_after_a_cast_makes_a_new_pool():
    model = fresh_pair()[1]
    both([model])
    cache = DynamicCache(config=model.double().config)
    with torch.no_grad():
        model(zoo.prompts([9])["input_ids"], past_key_values=cache)
    assert [key.states_dtype for key in registry.pools_under(model)[0].groups] == [torch.float64]


def test_no_step_is_run_in_vain_after_a_cast(rows):
    model = fresh_pair()[1]
    both([model])
    before = list(rows)
    rows.clear()
    both([model.double()])
    assert rows == before


def test_layers_of_another_shape():
    models = fresh_pair()
    assert torch.equal(*both(models))
    for model in models:
        other = zoo.build("llama", "sdpa", num_key_value_heads=4)
        model.model.layers[1].self_attn = other.model.layers[1].self_attn
        model.model.layers[1].self_attn.config = model.config
    assert torch.equal(*both(models))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 2 and not stats.fallbacks


class MixesRows:
    """A hook after which every token feels all tokens of its forward, while it is on."""

    def __init__(self):
        self.is_on = True

    def __call__(self, module, args, output):
        return output + 100 * output.mean(1, keepdim=True) if self.is_on else output


def refused():
    """A model whose packed steps are refused, and the hook that is the cause."""
    model, mixes = fresh_pair()[1], MixesRows()
    handle = model.model.norm.register_forward_hook(mixes)
    both([model])
    assert hf_paged.stats(model).fallbacks == {"the model mixes the rows of a packed forward": 1}
    return model, mixes, handle


def test_a_refusal_is_doubted_when_the_model_changes():
    model, _, handle = refused()
    handle.remove()
    both([model])
    assert hf_paged.stats(model).packed_calls == 1


def test_a_refusal_whose_cause_cannot_be_seen_is_doubted_now_and_then():
    model, mixes, _ = refused()
    mixes.is_on = False
    for _ in range(9):
        both([model])
    assert hf_paged.stats(model).packed_calls == 1
    assert sum(hf_paged.stats(model).fallbacks.values()) == 9


def test_a_model_that_stays_refused_is_tried_ever_less(monkeypatch):
    model, _, _ = refused()
    trials, make = [], trial.make_engine
    monkeypatch.setattr(trial, "make_engine", lambda *args, **how: (trials.append(len(calls)), make(*args, **how))[1])
    calls = []
    for number in range(60):
        calls.append(number)
        generate.engine_for(model, model.device)
    assert trials == [9, 26, 59]


def test_a_full_pool_is_no_lasting_refusal():
    model = fresh_pair()[1]
    hf_paged.configure(model, PagedConfig(block_size=4, memory_budget=8 * BLOCK))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(zoo.prompts([32])["input_ids"], past_key_values=cache)
    assert hf_paged.stats(model).free_blocks == 0
    ids = zoo.prompts([5])
    model.generate(**ids, max_new_tokens=3)
    assert hf_paged.stats(model).fallbacks == {"the pool has no room to try a packed step": 1}
    del cache
    model.generate(**ids, max_new_tokens=3)
    assert hf_paged.stats(model).packed_calls == 1


def test_configure_while_an_engine_is_tried(monkeypatch):
    """Another thread may call it: the engine that was made for the old pool serves that one call at most."""
    dense, paged = fresh_pair()
    make = trial.make_engine

    def make_and_configure(*args, **how):
        engine = make(*args, **how)
        hf_paged.configure(paged, PagedConfig(block_size=8))
        return engine

    monkeypatch.setattr(trial, "make_engine", make_and_configure)
    expected, got = both((dense, paged))
    assert torch.equal(expected, got)
    monkeypatch.setattr(trial, "make_engine", make)
    assert torch.equal(expected, both([paged])[0])
    stats = hf_paged.stats(paged)
    assert stats.block_size == 8 and stats.page_reads > 0
