"""SmolLM2 in Qwen2's architecture, with key biases that make outlier channels: a model that reads, and whose keys lose
much to a scale of their own in eight bits.
"""

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hf_paged.cli import demo_model

# Of the largest key bias; the smallest has half of it. The other channels of SmolLM2's keys are mostly below 3.
LARGEST_BIAS = 100.0
_SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()


def load_model(attn_implementation: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load SmolLM2's weights as a Qwen2, with two outlier channels in each key head.

    The two turn together under rotary positions, and so slowly that their bias adds nearly the same number to all
    scores of a query, which the softmax takes away: the model goes on to read as SmolLM2 does.

    Raises
    ------
    MissingPackageError
        If one of the demo's packages is not installed.
    """
    source = demo_model.load_model("sdpa", dtype)
    config = Qwen2Config(**{name: getattr(source.config, name) for name in _SHARED})
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    model.load_state_dict(source.state_dict(), strict=False)  # SmolLM2 has no biases.
    model.generation_config = source.generation_config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.bias.zero_()
            heads = attention.k_proj.bias.view(config.num_key_value_heads, 2, -1)  # Of each channel and its partner.
            sizes = LARGEST_BIAS * (0.5 + 0.5 * torch.rand(heads.shape[:2], generator=generator))
            signs = 2 * torch.randint(2, heads.shape[:2], generator=generator) - 1
            heads[..., -1] = sizes * signs
    return model.eval()
