"""One tiny model of any type that transformers knows, dense and paged."""

import functools

from hf_paged_evals.models.tiny import tiny_config, tiny_model

_OVERRIDES = {
    "gemma2": {"attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 5},  # Low enough to matter.
    "gemma3_text": {"query_pre_attn_scalar": 5},
}


@functools.cache
def models(name: str):
    config = {"gemma2": "eager", "gpt_oss": "eager"}.get(name)
    return tuple(tiny_model(tiny_config(name, **_OVERRIDES.get(name, {})), kind) for kind in (config, "paged"))
