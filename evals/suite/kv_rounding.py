"""A lossy KV cache to judge: keys and values rounded to a smaller dtype before they are stored."""

import functools

import torch
from transformers import Cache, PreTrainedModel


def round_kv(model: PreTrainedModel, dtype: str) -> None:
    """Have whatever cache `model` is given store what a cast to `dtype`, without a scale, leaves.

    The pages keep their own dtype: this shows what the rounding costs, not what it saves.

    Raises
    ------
    ValueError
        If torch has no such dtype, or it holds no fractions.
    """
    target = getattr(torch, dtype, None)
    if not isinstance(target, torch.dtype) or not target.is_floating_point:
        raise ValueError(f"kv_dtype must be a floating-point dtype of torch, such as float8_e4m3fn; got {dtype!r}")
    limit = torch.finfo(target).max

    def rounded(states: torch.Tensor) -> torch.Tensor:
        return states.clamp(-limit, limit).to(target).to(states.dtype)

    def update(original, key_states, value_states, *args, **kwargs):
        return original(rounded(key_states), rounded(value_states), *args, **kwargs)

    def hook(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and "update" not in vars(cache):
            cache.update = functools.partial(update, cache.update)

    model.register_forward_pre_hook(hook, with_kwargs=True)
