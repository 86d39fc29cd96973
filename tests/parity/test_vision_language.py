"""Vision-language models: images enter as embeddings, the text decoder reads pages."""

import pytest
import torch
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import hf_paged
from support.multimodal import IMAGE, TEXT, image_prompt, llava

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    inputs = image_prompt()
    inputs["input_ids"][:, 3], inputs["input_ids"][:, 4:8] = 96, IMAGE
    images = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = (inputs["input_ids"] == IMAGE).int()
    return Qwen2VLForConditionalGeneration, config, {**inputs, **images, "mm_token_type_ids": kinds}


def mllama():
    """Cross-attention layers that keep the image in the same cache as the text."""
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 32,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    inputs = image_prompt()
    inputs["input_ids"][:, 4] = IMAGE
    images = {
        "pixel_values": torch.randn(2, 1, 1, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 12, 1, 1, dtype=torch.long),
    }
    return MllamaForConditionalGeneration, config, {**inputs, **images}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [llava, qwen2_vl, mllama])
def test_equal_to_dense(build, mode):
    torch.manual_seed(0)
    kind, config, inputs = build()
    outputs = []
    for implementation in ("sdpa", "paged"):
        torch.manual_seed(0)
        model = kind._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name and "gate_proj" not in name:  # mllama starts with its cross-attention shut.
                    parameter.fill_(0.7)
        torch.manual_seed(1)
        outputs.append(model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, **MODES[mode]))
    assert torch.equal(*outputs)
    assert hf_paged.stats(model).page_reads > 0
