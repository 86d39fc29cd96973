"""Where nothing is paged, sdpa is asked for what it is asked without us: no mask more, `is_causal` and GQA as there."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from support import zoo

EQUAL, RAGGED = zoo.prompts([11, 11]), zoo.prompts([11, 6])
FEW = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(**options):
    return lambda model, inputs: model.generate(**inputs, **FEW, **options)


def forward(**options):
    return lambda model, inputs: model(**inputs, **options).logits


def with_cache(make, **options):
    return lambda model, inputs: model(**inputs, past_key_values=make(model.config), **options).logits


def static(config):
    return StaticCache(config=config, max_cache_len=24)


CALLS = {
    "lone": forward(),
    "lone_last_logit": forward(logits_to_keep=1),
    "lone_last_logits": forward(logits_to_keep=3),
    "no_cache": forward(use_cache=False),
    "no_cache_last_logit": forward(use_cache=False, logits_to_keep=1),
    "prefill": with_cache(lambda config: DynamicCache(config=config), logits_to_keep=1),
    "static_prefill": with_cache(static, logits_to_keep=1),
    "generate_static": generate(cache_implementation="static", disable_compile=True),
    "generate_static_beams": generate(cache_implementation="static", disable_compile=True, num_beams=2),
    "generate_no_cache": generate(use_cache=False),
}


@pytest.fixture
def asked(monkeypatch):
    """Arguments of every call of sdpa, but for the contents of its tensors."""
    calls, attend = [], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)
        calls.append((query.shape, key.shape, value.shape, mask, options))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def asks_the_same(asked, models, call, inputs):
    results, seen = [], []
    for model in models:
        with torch.no_grad():
            results.append(call(model, inputs))
        seen.append(list(asked))
        asked.clear()
    assert seen[0] and seen[1] == seen[0]
    real = slice(None) if results[0].dim() < 3 else inputs["attention_mask"][:, -results[0].shape[1] :].bool()
    torch.testing.assert_close(results[0][real], results[1][real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("inputs", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_sdpa_is_asked_the_same(name, call, inputs, asked):
    asks_the_same(asked, zoo.pair(name), call, inputs)


@pytest.mark.parametrize("inputs", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("call", ["lone_last_logit", "no_cache_last_logit", "generate_no_cache"])
def test_a_model_that_drops_queries_asks_the_same_for_one_logit(call, inputs, asked):
    asks_the_same(asked, zoo.pair("gemma4_text"), CALLS[call], inputs)


@pytest.mark.parametrize("inputs", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_that_drops_queries_is_right(call, inputs):
    """gemma4 drops them where no implementation is named "sdpa": without a mask they would count from the first key."""
    with torch.no_grad():
        results = [call(model, inputs) for model in zoo.pair("gemma4_text")]
    real = slice(None) if results[0].dim() < 3 else inputs["attention_mask"][:, -results[0].shape[1] :].bool()
    torch.testing.assert_close(results[0][real], results[1][real], atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_that_drops_queries_is_right():
    results = []
    for model in zoo.pair("gemma4_text"):
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, backend="eager", dynamic=True)
        with torch.no_grad():
            cache = static(model.config)
            results.append(compiled(EQUAL["input_ids"], logits_to_keep=3, past_key_values=cache).logits)
    torch._dynamo.reset()
    torch.testing.assert_close(*results, atol=2e-4, rtol=1e-4)
