"""Calls that pages cannot serve go dense and stay right; arguments that are not known are refused."""

import gc
import inspect
import re
import sys

import pytest
import torch
from transformers import DynamicCache, masking_utils

import hf_paged
from hf_paged.attention.mask import causal_pattern
from hf_paged.attention.paged_attention import paged_attention_forward
from hf_paged.cache.cross_attention import StoredStates
from hf_paged.cache.lazy_tensors import MaskPattern, PagedMask, PagedStates
from hf_paged.models import forward_context
from support import zoo
from support.parity import assert_generates_equal

every_model = pytest.mark.parametrize("models", zoo.NAMES, indirect=True)


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@every_model
@pytest.mark.parametrize("padded", [False, True])
def test_no_cache(models, padded):
    inputs = zoo.prompts([12, 5] if padded else [12, 12])
    with torch.no_grad():
        outputs = [model(**inputs, use_cache=False).logits for model in models]
    real = inputs["attention_mask"].bool()
    assert_close(outputs[0][real], outputs[1][real])


@every_model
def test_gradients(models):
    inputs = zoo.prompts([8, 8])
    gradients = []
    for model in models:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@every_model
def test_gradients_through_a_past(models):
    """A cache that carries a graph stays dense, as upstream keeps it."""
    ids = zoo.prompts([8, 8])["input_ids"]
    gradients = []
    for model in models:
        cache = DynamicCache(config=model.config)
        model.zero_grad()
        model(ids[:, :5], past_key_values=cache)
        model(ids[:, 5:], past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-3)


def test_training_mode_with_dropout_runs_on_a_cache():
    model = zoo.build("llama", "paged", attention_dropout=0.5).train()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(zoo.prompts([8])["input_ids"], past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    assert "attention dropout is on" in hf_paged.stats(model).gathers
    del cache


@every_model
def test_output_attentions(models):
    """sdpa gives none; "paged" gives what eager gives."""
    inputs = zoo.prompts([9, 9])
    eager = zoo.build(models[0].config.model_type, "eager")
    kwargs = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_attentions": True, "eos_token_id": None}
    expected, got = (model.generate(**inputs, **kwargs) for model in (eager, models[1]))
    assert torch.equal(expected.sequences, got.sequences)
    for layers in zip(expected.attentions, got.attentions, strict=True):
        for a, b in zip(*layers, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_custom_4d_masks(name):
    models = zoo.pair(name)
    ids = zoo.prompts([6, 6])["input_ids"]
    additive = name == "gpt_oss"
    logits = []
    for model in models:
        cache = DynamicCache(config=model.config)
        rows = []
        for start, end in ((0, 4), (4, 6)):
            mask = torch.ones(2, 1, end - start, end, dtype=torch.bool).tril(start)
            mask[0, :, :, 1] = False
            mask[0, :, 1, 1] = True
            if additive:
                mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            with torch.no_grad():
                rows.append(model(ids[:, start:end], attention_mask=mask, past_key_values=cache).logits)
        logits.append(torch.cat(rows, 1))
        del cache
    assert_close(*logits)
    assert "the attention mask is a custom one" in hf_paged.stats(models[1]).gathers


def test_a_mask_with_a_custom_overlay_is_not_taken_for_causal(monkeypatch):
    """A model that adds its own mask function (image tokens that see each other) gathers."""
    from transformers.models.llama import modeling_llama

    def see_pairs(batch, head, q, kv):
        return q // 2 == kv // 2

    original = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda **kwargs: original(**kwargs, or_mask_function=see_pairs)
    )
    models = zoo.pair("llama")
    hf_paged.release(models[1])
    ids = zoo.prompts([10, 10])["input_ids"]
    logits = []
    for model in models:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            rows = [model(piece, past_key_values=cache).logits for piece in (ids[:, :6], ids[:, 6:])]
        logits.append(torch.cat(rows, 1))
        del cache
    assert_close(*logits)
    stats = hf_paged.stats(models[1])
    assert stats.page_reads == 0 and "the attention pattern is not causal" in stats.gathers


def test_operations_on_keys_get_dense_tensors(monkeypatch):
    """A model that does something to its keys after the cache is right, through a gather."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.forward

    class Doubling(DynamicCache):
        pass

    def doubled(update):
        def inner(self, keys, values, *args, **kwargs):
            keys, values = update(self, keys, values, *args, **kwargs)
            return keys * 2, values

        return inner

    monkeypatch.setattr(DynamicCache, "update", doubled(DynamicCache.update))
    assert modeling_llama.LlamaAttention.forward is original
    models = zoo.pair("llama")
    inputs = zoo.prompts([9, 5])
    hf_paged.release(models[1])
    outputs = [model.generate(**inputs, max_new_tokens=8) for model in models]
    assert torch.equal(*outputs)
    assert hf_paged.stats(models[1]).page_reads == 0
    assert any("aten.mul" in reason for reason in hf_paged.stats(models[1]).gathers)


def test_writing_into_returned_keys_is_refused():
    paged = zoo.pair("llama")[1]
    cache = DynamicCache(config=paged.config)
    with torch.no_grad():
        paged(zoo.prompts([9])["input_ids"], past_key_values=cache)
        forward_context._thread.forwards.append(
            forward_context.Forward(paged.model, forward_context.Inputs((), {}), sys._getframe())
        )
        try:
            states = torch.zeros(1, 2, 1, 16)
            keys, values = cache.layers[0].update(states, states)
            with pytest.raises(RuntimeError, match="in place"):
                keys.mul_(2)
        finally:
            forward_context._thread.forwards.clear()
    del cache, keys, values


def test_unknown_attention_arguments_are_refused_by_name():
    module = torch.nn.Module()
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(hf_paged.UnsupportedError, match='passes tree_mask .* load the model with "sdpa"'):
        paged_attention_forward(module, states, states, states, None, tree_mask=torch.zeros(1))


def test_arguments_that_are_none_are_no_arguments():
    module = torch.nn.Module()
    states = torch.randn(1, 2, 3, 4)
    output, _ = paged_attention_forward(module, states, states, states, None, indices=None)
    expected = torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["s_aux", "sinks", "softcap"])
def test_what_sdpa_would_ignore_is_refused_without_an_eager_function(name):
    states = torch.randn(1, 2, 3, 4)
    with pytest.raises(hf_paged.UnsupportedError, match='has no eager_attention_forward: load the model with "eager"'):
        paged_attention_forward(torch.nn.Module(), states, states, states, None, **{name: torch.ones(2)})


def test_position_bias_is_added():
    module = torch.nn.Module()
    states, bias = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 3)
    output, _ = paged_attention_forward(module, states, states, states, None, position_bias=bias, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=bias)
    assert_close(output, expected.transpose(1, 2))


def test_causal_patterns_are_recognised():
    window = masking_utils.sliding_window_causal_mask_function(5)
    assert causal_pattern(masking_utils.causal_mask_function) == MaskPattern(None)
    assert causal_pattern(window) == MaskPattern(5)
    nested = masking_utils.and_masks(masking_utils.sliding_window_overlay(3), window)
    assert causal_pattern(nested) is None or causal_pattern(nested) == MaskPattern(3)


def test_everything_else_is_not():
    causal = masking_utils.causal_mask_function
    overlay = masking_utils.sliding_window_overlay(5)
    for function in (
        masking_utils.bidirectional_mask_function,
        overlay,
        masking_utils.or_masks(causal, overlay),
        masking_utils.and_masks(causal, lambda b, h, q, kv: q > kv + 3),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1)),
        masking_utils.and_masks(overlay, overlay),
    ):
        assert causal_pattern(function) is None


def test_the_request_for_a_mask_is_cleared_when_a_forward_fails():
    dense, paged = zoo.pair("llama")
    cache = DynamicCache(config=paged.config)
    with torch.no_grad():
        paged(zoo.prompts([9])["input_ids"], past_key_values=cache)
        cache.layers[0].get_mask_sizes(1)
        assert forward_context._thread.mask_request is not None
        with pytest.raises(IndexError):
            paged(torch.tensor([[10**6]]), past_key_values=cache)
    assert forward_context._thread.mask_request is None and not forward_context._thread.forwards
    del cache


def test_layers_that_failed_halfway_do_not_poison_the_next_call():
    dense, paged = zoo.pair("llama")
    ids = zoo.prompts([9])["input_ids"]

    def fail(module, args):
        raise KeyError("halfway")

    hook = paged.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="halfway"):
        paged.generate(ids, max_new_tokens=4)
    hook.remove()
    assert not forward_context._thread.forwards
    assert torch.equal(dense.generate(ids, max_new_tokens=8), paged.generate(ids, max_new_tokens=8))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_model_with_attention_of_its_own(options):
    """Bloom knows eager attention only, adds its masks to scores, and takes views of its keys."""
    models = [zoo.build("bloom", implementation) for implementation in ("eager", "paged")]
    inputs = zoo.prompts([11, 7])
    assert torch.equal(*(model.generate(**inputs, max_new_tokens=14, **options) for model in models))
    assert hf_paged.stats(models[1]).gathers


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_layers_that_reuse_the_keys_of_others(options):
    """Handles are kept across layers within a forward, while other groups begin their steps."""
    assert_generates_equal(zoo.pair("gemma3n_text"), zoo.prompts([12, 5]), **options)


def test_a_compiled_forward_is_right():
    dense, paged = zoo.pair("llama")[0], zoo.build("llama", "paged")
    paged.forward = torch.compile(paged.forward, backend="eager")
    inputs = zoo.prompts([9, 5])
    assert torch.equal(dense.generate(**inputs, max_new_tokens=4), paged.generate(**inputs, max_new_tokens=4))
    del paged
    torch._dynamo.reset()
    gc.collect()  # Dynamo keeps the frames it traced in reference cycles, and with them the last cache.


@pytest.mark.parametrize("kind", [PagedStates, PagedMask, StoredStates])
def test_no_attribute_of_a_handle_hides_a_tensor_method(kind):
    """A model may call any method of a tensor on its keys: ``key.view(...)`` must stay that."""
    ours = set(vars(kind)) | set(re.findall(r"self\.(\w+)[, ].*=", inspect.getsource(kind.__new__)))
    assert not {name for name in ours if hasattr(torch.Tensor, name) and not name.startswith("__")}
