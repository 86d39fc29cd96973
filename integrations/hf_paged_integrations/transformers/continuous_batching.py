"""transformers' own continuous batching (``generate_batch`` and its kin) on a model loaded with "paged".

It brings a cache and masks of its own, which transformers' sdpa and eager functions read. The model stays "paged"
meanwhile: calls of `generate` in other threads go on, and there is nothing to put back.
"""

from hf_paged.attention.paged_attention import paged_attention_forward
from hf_paged.compat.transformers import (
    ContinuousBatchingCache,
    attend_to_continuous_batch,
    attend_to_continuous_batch_with_sdpa,
    attention_implementation,
)
from hf_paged.errors import UnsupportedError
from hf_paged.models import forward_context


def attention_forward(module, query, key, value, attention_mask, **kwargs):
    """The attention function of a "paged" model: `paged_attention_forward`, but for transformers' own cache.

    Raises
    ------
    UnsupportedError
        If transformers' continuous batching would leave out the model's softcap.
    """
    if not isinstance(kwargs.get("cache"), ContinuousBatchingCache):
        return paged_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} caps its attention scores (softcap), which transformers' continuous batching "
            "does not: call model.generate, which packs rows too"
        )
    forward = forward_context.current_forward()
    has_sinks = kwargs.get("s_aux") is not None or kwargs.get("sinks") is not None
    is_fused = not has_sinks and (forward is None or forward.supports_sdpa)
    attend = attend_to_continuous_batch_with_sdpa if is_fused else attend_to_continuous_batch
    return attend(module, query, key, value, attention_mask, **kwargs)


def leave_config_alone(model, args, kwargs):
    """A forward pre-hook: a forward of continuous batching leaves the model's config to the calls of other threads.

    It comes with a mask and with ``is_causal=False``, which transformers writes into the config until the forward ends.
    Any other forward of the model would see what comes after its tokens then. With a mask, the argument says nothing.
    """
    is_ours = isinstance(kwargs.get("cache"), ContinuousBatchingCache) and kwargs.get("attention_mask") is not None
    return (args, {**kwargs, "is_causal": None}) if is_ours and "is_causal" in kwargs else None


def is_mask_needed(config, result: bool) -> bool:
    """The answer of transformers' ``attn_mask_is_needed``, and True for "paged"."""
    return result or attention_implementation(config) == "paged"


def switch_attention(original, manager, model, *args, **kwargs) -> None:
    """``ContinuousBatchingManager.switch_to_cb_friendly_attn``: a "paged" model suits as it is."""
    if attention_implementation(model.config) != "paged":
        original(manager, model, *args, **kwargs)
