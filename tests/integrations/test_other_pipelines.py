"""Pipelines besides text-generation that call `generate`: equal to stock, with the paged cache in use."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    WhisperFeatureExtractor,
    WhisperTokenizer,
    pipeline,
)

import hf_paged
from support import texts
from support.multimodal import whisper


def whisper_tokenizer() -> WhisperTokenizer:
    """Every id of the tiny Whisper: letters, special tokens, then timestamps."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|pad|>", "<|notimestamps|>"]
    words = [*special[:3], "<|start|>", *(chr(0x100 + number) for number in range(92)), special[3]]
    words += [f"<|{number * 0.02:.2f}|>" for number in range(157 - len(words))]
    return WhisperTokenizer({word: number for number, word in enumerate(words)}, [], pad_token="<|pad|>")


@pytest.mark.parametrize("options", [{}, {"return_timestamps": True}, {"generate_kwargs": {"num_beams": 2}}], ids=str)
def test_automatic_speech_recognition(options):
    features = WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=80, hop_length=267)
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(length).astype(np.float32) for length in (9000, 16000, 12000)]
    results = []
    for implementation in ("sdpa", "paged"):
        model = whisper(implementation)
        pipe = pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=whisper_tokenizer(),
            feature_extractor=features,
            max_new_tokens=10,
        )
        results.append(list(pipe(iter_of(sounds), **options)))
    assert results[0] == results[1] and len(results[0]) == 3
    assert any(result["text"] for result in results[0])
    stats = hf_paged.stats(model)
    assert stats.page_reads > 0 and not stats.gathers and stats.implementation == "paged"


def iter_of(items):
    """Items one by one: pipelines stream generators."""
    yield from items


def llava(implementation: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=32)
    text = LlamaConfig(
        **sizes, **{"vocab_size": 99, "num_key_value_heads": 2, "initializer_range": 0.4, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2},
    )  # fmt: skip
    features = {"vision_feature_select_strategy": "default", "vision_feature_layer": -1}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=98, image_seq_length=4, **features)
    return AutoModelForImageTextToText.from_config(config, attn_implementation=implementation).eval()


def llava_processor() -> LlavaProcessor:
    tokenizer = texts.tokenizer(98, extra_special_tokens={"image_token": "<image>"})
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"generate_kwargs": {"num_beams": 2}}], ids=str)
def test_image_text_to_text(options):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    prompts = [f"<image>{text}" for text in texts.prompts(3)]
    results = []
    for implementation in ("sdpa", "paged"):
        model = llava(implementation)
        pipe = pipeline("image-text-to-text", model=model, processor=llava_processor(), max_new_tokens=10)
        results.append(pipe(images, text=prompts, **options))
    assert results[0] == results[1] and len(results[0]) == 3
    stats = hf_paged.stats(model)
    assert stats.page_reads > 0 and not stats.gathers
