"""Tiny random models as (dense, paged) pairs with the same weights, and prompts for them."""

import functools

import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_paged_evals.models.tiny import VOCAB, tiny_config, tiny_model

# One for each kind of attention that pages serve in every layer.
NAMES = ["llama", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt_oss", "gpt2"]
_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_OVERRIDES = {
    "gemma2": {"attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 5},  # Low enough to matter.
    "gemma3_text": {"query_pre_attn_scalar": 5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_oss": {"num_experts": 2},
}


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float32):
    """The dense model and the paged one, equal but for the attention implementation; of any causal type."""
    dense = "eager" if dense_implementation(name) == "eager" else None  # None: the type may have no sdpa.
    return tuple(build(name, implementation, dtype) for implementation in (dense, "paged"))


def dense_implementation(name: str) -> str:
    """The implementation that transformers picks for the model by itself."""
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def build(name: str, implementation: str | None, dtype: torch.dtype = torch.float32, **overrides):
    """A new model with random weights that depend on `name` only."""
    config = tiny_config(name, **{**_OVERRIDES.get(name, {}), **overrides})
    model = tiny_model(config, implementation, dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:  # Sinks that take a visible share of the softmax.
                parameter.fill_(2.0)
    return model


def build_encoder_decoder(name: str, implementation: str):
    """A new T5 or BART with random weights that depend on `name` only."""
    torch.manual_seed(0)
    sizes = {
        "t5": {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "bart": {"init_std": 0.4, "decoder_start_token_id": 2, "max_position_embeddings": 64}
        | {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in _SIDE.items()},
    }[name]
    config = CONFIG_MAPPING[name](vocab_size=VOCAB, d_model=32, pad_token_id=0, **sizes)
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation).eval()


def prompts(lengths, seed: int = 0):
    """Left-padded random prompts of the given lengths, as keyword arguments of `generate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
