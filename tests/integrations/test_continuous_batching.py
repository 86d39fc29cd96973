"""transformers' own continuous batching on models loaded with "paged": as on the same models loaded without."""

import threading

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_paged
from support import zoo
from support.packing import LENGTHS

SMALL = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32), "warmup": False}
PROMPTS = [zoo.prompts([length], seed=length)["input_ids"][0].tolist() for length in (9, 4, 17)]


def config() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)


def batched(model) -> list[list[int]]:
    results = model.generate_batch(PROMPTS, generation_config=config(), **SMALL)
    assert not any(result.error for result in results.values())
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_generate_batch(name):
    dense, paged = zoo.pair(name)
    hf_paged.release(paged)
    assert batched(paged) == batched(dense)
    assert hf_paged.stats(paged).implementation == "paged" and hf_paged.stats(paged).total_blocks == 0
    dense.set_attn_implementation(zoo.dense_implementation(name))  # "eager" was put back as transformers does it.
    one = zoo.prompts([9])
    assert torch.equal(paged.generate(**one, **LENGTHS), dense.generate(**one, **LENGTHS))
    assert hf_paged.stats(paged).page_reads > 0


def test_the_context_manager_with_calls_of_generate_inside():
    dense, paged = zoo.pair("llama")
    prompt = zoo.prompts([11, 4])
    expected = dense.generate(**prompt, **LENGTHS)
    hf_paged.release(paged)
    got = []
    with paged.continuous_batching_context_manager(generation_config=config(), **SMALL) as manager:
        manager.add_requests(PROMPTS)
        thread = threading.Thread(target=lambda: got.append(paged.generate(**prompt, **LENGTHS)))
        thread.start()
        results = {}
        while len(results) < len(PROMPTS):
            if (result := manager.get_result(timeout=1)) is not None:
                results[result.request_id] = result.generated_tokens
        thread.join()
    assert [results[name] for name in sorted(results)] == batched(dense)
    assert torch.equal(got[0], expected) and hf_paged.stats(paged).packed_calls == 1


def test_cache_implementation_paged():
    dense, paged = zoo.pair("llama")
    prompt = zoo.prompts([9])["input_ids"]
    options = {"cache_implementation": "paged", "max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, **SMALL}
    assert torch.equal(paged.generate(prompt, **options), dense.generate(prompt, **options))
    assert hf_paged.stats(paged).implementation == "paged"


def test_an_error_leaves_the_model_as_it_was():
    dense, paged = zoo.pair("llama")
    with pytest.raises(RuntimeError, match="in the body"):
        with paged.continuous_batching_context_manager(generation_config=config(), **SMALL):
            raise RuntimeError("in the body")
    assert paged.config._attn_implementation == "paged"
    assert batched(paged) == batched(dense)


def test_a_softcap_is_kept_or_is_an_error():
    """Where transformers hands its cache to the attention function, its own functions would leave the softcap out."""
    dense, paged = zoo.pair("gemma2")
    results = paged.generate_batch(PROMPTS, generation_config=config(), **SMALL)
    assert results
    if any(result.error for result in results.values()):
        assert all("softcap" in result.error for result in results.values())
    else:
        options = {"max_new_tokens": config().max_new_tokens, "do_sample": False}
        alone = [dense.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]
        assert [result.generated_tokens for result in results.values()] == alone


def test_other_implementations_are_refused_as_before():
    model = zoo.build("llama", "flex_attention")
    with pytest.raises(ValueError, match="flex_attention.* is not supported"):
        model.init_continuous_batching(generation_config=config())
