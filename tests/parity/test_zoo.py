"""Every kind of architecture: the tokens of dense in every mode dense supports, out of pages or through gathers."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_paged
from hf_paged.reasons import Reason
from hf_paged_evals.models.tiny import tiny_config, tiny_model
from support import one_ahead, zoo
from support.parity import assert_rows_equal

PAGES = (
    "llama qwen2 qwen3 smollm3 mistral gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss mixtral olmo2 granite "
    "starcoder2 phi phi3 stablelm cohere cohere2 gpt2 opt gpt_neox qwen3_next granitemoehybrid jamba"
).split()
# Latents in pages. Upstream's loop expands them for each forward, and so gathers; packed steps absorb the expansion.
LATENTS = "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash minicpm3 youtu".split()
# Their recurrent layers keep them in upstream's loop. The oldest transformers lacks the first.
HYBRID_LATENTS = [name for name in ("bailing_hybrid", "kimi_linear") if name in CONFIG_MAPPING]
GATHERS = "bloom diffllama jetmoe doge llama4_text gpt_neox_japanese moshi".split()
OWN = ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "falcon_h1", "mamba", "recurrent_gemma"]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sample": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "chunked": {"prefill_chunk_size": 4},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


def outcome(model, inputs, options):
    """The tokens, or the kind of error where the model does not support the mode."""
    torch.manual_seed(0)
    try:
        return model.generate(**inputs, max_new_tokens=14, min_new_tokens=14, pad_token_id=0, **options)
    except Exception as error:  # Dense decides what a mode supports; paged must agree.
        return type(error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAGES + LATENTS + HYBRID_LATENTS + GATHERS + OWN)
def test_every_mode_of_every_architecture(name, mode):
    dense_model, paged_model = zoo.pair(name)
    inputs = zoo.prompts([11] if mode == "assisted" else [11, 4])
    dense = outcome(dense_model, inputs, MODES[mode])
    hf_paged.release(paged_model)
    paged = outcome(paged_model, inputs, MODES[mode])
    if isinstance(dense, type):
        assert paged is dense
        return
    assert not isinstance(paged, type), paged
    assert_rows_equal(dense_model, inputs, dense, paged)
    stats = hf_paged.stats(paged_model)
    assert (stats.page_reads > 0) or name not in PAGES, "no attention call read pages: this is sdpa in disguise"
    if name in LATENTS:
        check_latents(stats, is_packed=mode in ("greedy", "sample", "chunked"))
    elif name in HYBRID_LATENTS:
        assert list(stats.gathers) == [Reason.EXPANDED_LATENTS.text]
    elif name in GATHERS:
        assert stats.gathers
    elif name != "gemma4_text" or mode not in ("chunked", "assisted"):  # There it cuts its mask to the last queries.
        assert not stats.gathers, stats.gathers


def check_latents(stats, is_packed: bool) -> None:
    assert (stats.packed_calls > 0) == (stats.page_reads > 0) == is_packed, stats.fallbacks
    assert list(stats.gathers) == ([] if is_packed else [Reason.EXPANDED_LATENTS.text])


@pytest.mark.parametrize("name", PAGES + LATENTS)
def test_greedy_steps_one_ahead(name, monkeypatch):
    dense_model, paged_model = zoo.pair(name)
    inputs, options = zoo.prompts([11, 4]), {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None}
    hf_paged.release(paged_model)
    dense = dense_model.generate(**inputs, **options)
    seen = one_ahead.force(monkeypatch)
    assert_rows_equal(dense_model, inputs, dense, paged_model.generate(**inputs, **options))
    assert seen.num_ahead or not hf_paged.stats(paged_model).packed_calls


def test_longrope_across_its_switch():
    """phi3 changes its frequencies, and drops its cache, where the context outgrows the original length."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 16.0,
        "partial_rotary_factor": 1.0,
    }
    sizes = {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0, "head_dim": None}
    config = tiny_config("phi3", rope_parameters=rope, **sizes)
    dense_model, paged_model = (tiny_model(config, kind) for kind in ("sdpa", "paged"))
    for lengths in ([10], [10, 10], [30, 30]):  # The switch lies inside the first two outputs.
        inputs = zoo.prompts(lengths)
        dense, paged = (outcome(model, inputs, {}) for model in (dense_model, paged_model))
        assert_rows_equal(dense_model, inputs, dense, paged)
    stats = hf_paged.stats(paged_model)
    assert stats.page_reads > 0 and not stats.gathers


INDEXED = ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "minimax_m3_vl_text"]
INDEXED += [name for name in ["dots3_note_text"] if name in CONFIG_MAPPING]  # Older versions have no such model.


@pytest.mark.parametrize("name", INDEXED)
def test_an_indexer_is_heard(name):
    """These models leave the mask whole for unknown implementations and hand over what their indexer chose."""
    config = tiny_config(name)
    dense_model, paged_model = (tiny_model(config, kind) for kind in (None, "paged"))
    inputs = zoo.prompts([20, 20])
    with torch.no_grad():
        dense, paged = (model(**inputs).logits for model in (dense_model, paged_model))
    torch.testing.assert_close(dense, paged, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [1, 3])
def test_few_logits_of_a_model_that_drops_queries(kept):
    """gemma4 attends with the last queries only, unless it finds an implementation named sdpa without a mask."""
    dense_model, paged_model = zoo.pair("gemma4_text")
    ids = zoo.prompts([6])["input_ids"]
    with torch.no_grad():
        dense, paged = (model(ids, logits_to_keep=kept).logits for model in (dense_model, paged_model))
    torch.testing.assert_close(dense, paged, atol=2e-4, rtol=1e-4)
