"""Tiny random models of (nearly) every causal model type that transformers knows, from their configs alone."""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 97

# Fields by their value: configs have many names for one size.
_FIELDS_BY_SIZE = (
    (32, "hidden_size d_model n_embd embedding_size dim embedding_dim"),
    (48, "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size ffn_hidden_dim decoder_ffn_dim encoder_ffn_dim"),
    (48, "shared_expert_intermediate_size"),
    (16, "moe_intermediate_size expert_ffn_hidden_size"),
    (2, "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers"),
    (2, "num_decoder_layers num_encoder_layers"),
    (4, "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads"),
    (4, "n_routed_experts num_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "num_key_value_heads num_experts_per_tok moe_k moe_topk index_n_heads"),
    (16, "head_dim global_head_dim v_head_dim q_lora_rank kv_lora_rank index_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace"),
    (256, "max_position_embeddings n_positions n_ctx"),
    (7, "sliding_window attention_window_size"),  # Small, as index_topk is: short prompts must reach past them.
    (6, "index_topk"),
    (VOCAB, "vocab_size"),
)
_SMALL: dict[str, object] = {name: size for size, names in _FIELDS_BY_SIZE for name in names.split()}
_SMALL |= {
    # With the usual 0.02 attention is nearly uniform, and a wrong one goes unseen.
    "initializer_range": 0.4,
    "init_std": 0.4,
    "tie_word_embeddings": False,  # Tied, a tiny model repeats its last token whatever it attends to.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# Keys and values are expanded from a latent, with a KV head per head.
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_LATENT_TYPES = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear "
    "longcat_flash minicpm3 youtu"
).split()
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
_INDEXED = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
_SHARED_KV = {  # The last two layers attend over keys and values of the first two.
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA3N = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}

# Fields that a type needs besides.
_SPECIAL: dict[str, dict] = {
    **dict.fromkeys(_LATENT_TYPES, _LATENT),
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {**_SHARED_KV, **_PER_LAYER_INPUTS, **_GEMMA3N},
    "gemma4_text": {**_SHARED_KV, **_PER_LAYER_INPUTS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 7},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]},
    "roc_bert": {"shape_vocab_size": 9, "pronunciation_vocab_size": 9},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    """A config of that type with every size small.

    Parameters
    ----------
    model_type : str
        As in ``CONFIG_MAPPING``.
    **overrides
        Fields that are set as given.

    Raises
    ------
    Exception
        Of any class: the config class itself may refuse small sizes.
    """
    return _shrink(CONFIG_MAPPING[model_type], {**_SPECIAL.get(model_type, {}), **overrides})


def _shrink(config_class: type, overrides: dict) -> PreTrainedConfig:
    base = config_class()
    known = base.to_dict().keys() | {name for name in _SMALL if name in config_class.attribute_map}
    fields = {name: value for name, value in _SMALL.items() if name in known}
    kinds = list(dict.fromkeys(base.to_dict().get("layer_types") or ()))
    if kinds and "layer_types" in known:
        count = max(2, len(kinds))
        fields["layer_types"] = (kinds * 2)[:count]
        fields.update({name: count for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields})
    for name in base.sub_configs or ():
        part = getattr(base, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = _shrink(type(part), _SPECIAL.get(part.model_type, {})).to_dict()
    fields.update(overrides)
    config = config_class(**{name: value for name, value in fields.items() if value is not None})
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def tiny_model(
    config: PreTrainedConfig,
    implementation: str | None,
    dtype: torch.dtype = torch.float32,
    limit: float = 1e7,
) -> PreTrainedModel:
    """A causal model of `config` with random weights that depend on nothing else.

    Parameters
    ----------
    implementation : str or None
        Of its attention; None: the one that transformers picks.

    Raises
    ------
    ValueError
        If it has more than `limit` parameters; nothing is allocated then.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if parameters > limit:
        raise ValueError(f"the smallest known config of {config.model_type} has {parameters / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation, dtype=dtype
    ).eval()
