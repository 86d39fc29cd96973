"""Encoder-decoders: self-attention in pages; cross-attention stored once, shared between beams, read in place."""

import pytest
import torch

import hf_paged
from hf_paged_kernels import ops
from support import zoo
from support.multimodal import whisper

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "prompted": {"decoder_input_ids": torch.tensor([[5, 6, 7], [5, 9, 7]])},
}
BLOCKS = {"block4": 4, "default_block": 16}


def source(padded: bool) -> dict[str, torch.Tensor]:
    """Two sentences, the second shorter by right padding."""
    inputs = zoo.prompts([11, 11])
    if padded:
        inputs["input_ids"][1, 6:] = inputs["attention_mask"][1, 6:] = 0
    return inputs


@pytest.mark.parametrize("size", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_equal_to_dense(name, mode, padded, size):
    models = [zoo.build_encoder_decoder(name, implementation) for implementation in ("sdpa", "paged")]
    hf_paged.configure(models[1], hf_paged.PagedConfig(block_size=size))
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(**source(padded), max_new_tokens=14, min_new_tokens=14, **MODES[mode]))
    assert torch.equal(*outputs)
    stats = hf_paged.stats(models[1])
    assert stats.page_reads > 0
    # T5's self-attention adds a position bias in every layer; its cross-attention adds zeros.
    assert set(stats.gathers) == ({"a position bias is added to the scores"} if name == "t5" else set())


def test_cross_attention_is_stored_once_for_all_beams(monkeypatch):
    model = zoo.build_encoder_decoder("bart", "paged")
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=4))
    written = []
    write_kv = ops.write_kv
    monkeypatch.setattr(ops, "write_kv", lambda *args: (written.append(len(args[4])), write_kv(*args))[1])
    inputs = zoo.prompts([11])
    output = model.generate(**inputs, num_beams=4, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
    assert written.count(11) == model.config.decoder_layers, "keys and values of the encoder were written again"
    cross = output.past_key_values.cross_attention_cache.layers[0].batch
    tables = [table.blocks for rows in cross.groups.values() for table in rows.tables]
    assert len(tables) == 4 and len({tuple(blocks) for blocks in tables}) == 1, tables


def test_left_padding_of_the_encoder_is_gathered_once():
    models = [zoo.build_encoder_decoder("bart", implementation) for implementation in ("sdpa", "paged")]
    inputs = zoo.prompts([11, 6])
    assert torch.equal(*(model.generate(**inputs, max_new_tokens=12, min_new_tokens=12) for model in models))
    layers = models[1].config.decoder_layers
    assert hf_paged.stats(models[1]).gathers == {"the attention mask is a custom one": 2 * layers}


def test_keys_read_outside_a_forward_are_plain_tensors():
    models = [zoo.build_encoder_decoder("bart", implementation) for implementation in ("sdpa", "paged")]
    caches = [
        model.generate(**source(False), max_new_tokens=5, return_dict_in_generate=True).past_key_values
        for model in models
    ]
    for dense, paged in zip(*(cache.cross_attention_cache.layers for cache in caches)):
        assert type(paged.keys) is torch.Tensor
        torch.testing.assert_close(dense.keys, paged.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(dense.values, paged.values, atol=1e-4, rtol=1e-4)


def transcribe(model, frames: int, **options):
    features = torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, frames, dtype=torch.long)
    return model.generate(features, attention_mask=mask, max_new_tokens=16, **options)


@pytest.mark.parametrize("frames", [60, 150], ids=["short", "long_form"])
@pytest.mark.parametrize("options", [{"return_timestamps": True}, {"num_beams": 3}], ids=str)
def test_whisper(frames, options):
    models = [whisper(implementation) for implementation in ("sdpa", "paged")]
    assert torch.equal(*(transcribe(model, frames, **options) for model in models))
    stats = hf_paged.stats(models[1])
    assert stats.page_reads > 0 and not stats.gathers and stats.implementation == "paged"


def test_whisper_leaves_pages_for_word_timestamps_and_stats_say_so():
    """It sets its own config to eager, and leaves it there."""
    models = [whisper(implementation) for implementation in ("sdpa", "paged")]
    outputs = [transcribe(model, 60, return_timestamps=True, return_token_timestamps=True) for model in models]
    for name in ("sequences", "token_timestamps"):
        assert torch.equal(outputs[0][name], outputs[1][name])
    stats = hf_paged.stats(models[1])
    assert stats.implementation == "eager" and stats.page_reads == 0
    models[1].set_attn_implementation("paged")
    transcribe(models[1], 60)
    assert hf_paged.stats(models[1]).page_reads > 0
