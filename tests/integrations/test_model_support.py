"""Models that cannot be paged are refused when they are loaded, in a sentence."""

import importlib

import pytest
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

import hf_paged
from hf_paged_evals.models.tiny import tiny_config, tiny_model
from support import zoo
from support.parity import PageReads, assert_generates_equal

INSTEAD = {"falcon": '"sdpa" or "eager"', "gptj": '"eager"', "gpt_neo": '"eager"'}


def has_attention_classes(name):
    modelling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return any(word.endswith("ATTENTION_CLASSES") for word in vars(modelling))


def test_some_models_still_have_attention_classes_of_their_own():
    assert has_attention_classes("falcon")


@pytest.mark.parametrize("name, instead", INSTEAD.items())
def test_attention_classes_of_their_own(name, instead):
    config = tiny_config(name)
    if not has_attention_classes(name):  # Newer versions of some models call transformers' interface.
        dense, paged = zoo.pair(name)
        with PageReads(paged):
            assert_generates_equal((dense, paged), zoo.prompts([9, 4]))
        return
    with pytest.raises(hf_paged.UnsupportedError) as caught:
        tiny_model(config, "paged")
    assert f"models of type {name}" in str(caught.value)
    assert f"Load it with attn_implementation={instead}" in str(caught.value)
    tiny_model(config, "eager")  # Nothing of the attempt sticks to the config.


def test_an_image_encoder_with_attention_classes_of_its_own_keeps_sdpa():
    """It has no cache; a model around it may well be paged."""
    config = SamVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    encoder = SamVisionEncoder._from_config(config, attn_implementation="paged")
    assert encoder.config._attn_implementation == "sdpa"


def test_disabled_nothing_is_refused_by_us():
    hf_paged.disable()
    try:
        with pytest.raises(ValueError, match="is not supported"):
            tiny_model(tiny_config("falcon"), "paged")
    finally:
        hf_paged.enable()
