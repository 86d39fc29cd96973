"""Tiny random models, one for each kind of attention, as (dense, paged) pairs with the same weights."""

import functools

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large weights: with the default 0.02 attention is nearly uniform, and a wrong one goes unseen.
    "initializer_range": 0.4,
    "tie_word_embeddings": False,  # Tied, a tiny model repeats its last token whatever it attends to.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48}
_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_SPECIAL = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 5},
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 5},
    "gpt_oss": {**_WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gemma3n_text": {  # The last two layers attend over keys and values of the first two.
        **_WINDOWED,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt2": {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
NAMES = [name for name in _SPECIAL if name not in ("bloom", "gemma3n_text")]  # What pages serve in every layer.


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float32):
    """The dense model and the paged one, equal but for the attention implementation."""
    return tuple(build(name, implementation, dtype) for implementation in (dense_implementation(name), "paged"))


def dense_implementation(name: str) -> str:
    """The implementation that transformers picks for the model."""
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def build(name: str, implementation: str, dtype: torch.dtype = torch.float32, **overrides):
    """A new model with random weights that depend on `name` only."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**_COMMON, **_SPECIAL[name], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype).eval()
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
