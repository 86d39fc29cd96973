"""Tiny models that read images or sound."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


IMAGE = 98


def image_prompt() -> dict[str, torch.Tensor]:
    """Two prompts with an image each, the second left-padded."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    features = {"vision_feature_select_strategy": "default", "vision_feature_layer": -1}
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, image_seq_length=4, **features
    )
    inputs = image_prompt()
    inputs["input_ids"][:, 4:8] = IMAGE
    return LlavaForConditionalGeneration, config, {**inputs, "pixel_values": torch.randn(2, 3, 8, 8)}


def whisper(implementation: str):
    """A tiny Whisper with a generation config that knows timestamps and alignment heads."""
    torch.manual_seed(0)
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    config = WhisperConfig(
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        vocab_size=157,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=64,
        init_std=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    for name, value in {
        "no_timestamps_token_id": 96,
        "is_multilingual": False,
        "alignment_heads": [[0, 1], [1, 2]],
        "max_initial_timestamp_index": 20,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "return_timestamps": True,
    }.items():
        setattr(model.generation_config, name, value)
    return model
