"""Prompts of other integer types, and calls that keep their gradients."""

import inspect

import pytest
import torch
from transformers import GenerationMixin

import hf_paged
from support import zoo
from support.packing import LENGTHS
from support.parity import assert_generates_equal

MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "returned_rows": {"num_return_sequences": 2, "do_sample": True},
    "beams": {"num_beams": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "stop_at_a_token": {"eos_token_id": list(range(3, 40))},
}


def as_int32(inputs):
    return {name: value.int() for name, value in inputs.items()}


@pytest.mark.parametrize("mode", MODES)
def test_int32_prompts(mode):
    models, inputs = zoo.pair("llama"), as_int32(zoo.prompts([9, 4]))
    dense, paged = assert_generates_equal(models, inputs, **MODES[mode])
    assert dense.dtype == paged.dtype == torch.int64
    assert hf_paged.stats(models[1]).packed_calls == ("beam" not in mode)


def test_int32_prompts_with_assisted_decoding_and_returned_scores():
    models, inputs = zoo.pair("llama"), as_int32(zoo.prompts([9]))
    assert_generates_equal(models, inputs, prompt_lookup_num_tokens=2)
    dense, paged = assert_generates_equal(models, inputs, return_dict_in_generate=True, output_scores=True)
    assert dense.sequences.dtype == paged.sequences.dtype
    torch.testing.assert_close(dense.scores, paged.scores, atol=2e-4, rtol=1e-4)
    assert hf_paged.stats(models[1]).packed_calls == 1


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float32])
def test_ids_that_no_embedding_takes_raise_as_in_dense(dtype):
    errors = []
    for model in zoo.pair("llama"):
        with pytest.raises(RuntimeError) as caught:
            model.generate(zoo.prompts([9])["input_ids"].to(dtype), **LENGTHS)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


generate_with_gradients = inspect.unwrap(GenerationMixin.generate)


def gradient(model, rows: int, options: dict, embeds: bool = False) -> torch.Tensor:
    """Of the summed logits of every step, to the embeddings."""
    weight = model.get_input_embeddings().weight
    ids = zoo.prompts([9] * rows)["input_ids"]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embeds else {"input_ids": ids}
    returned = {"return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    output = generate_with_gradients(model, **inputs, **returned, max_new_tokens=5, pad_token_id=0, **options)
    return torch.autograd.grad(sum(logits.sum() for logits in output.logits), weight)[0]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sample", "beams"])
def test_gradients_flow_through_generate(rows, options):
    dense, paged = zoo.pair("llama")
    hf_paged.release(paged)
    torch.testing.assert_close(gradient(dense, rows, options), gradient(paged, rows, options), atol=1e-3, rtol=1e-3)
    expected = {} if options.get("num_beams") else {"gradients are enabled": 1}
    assert hf_paged.stats(paged).fallbacks == expected


def test_gradients_flow_to_embeddings_that_are_passed():
    dense, paged = zoo.pair("llama")
    torch.testing.assert_close(*(gradient(model, 1, {}, embeds=True) for model in (dense, paged)), atol=1e-3, rtol=1e-3)
    assert_generates_equal((dense, paged), zoo.prompts([9]))
    assert hf_paged.stats(paged).packed_calls == 1
