"""A lossy KV cache to judge: keys and values rounded to a smaller dtype before they are stored."""

import functools

import torch
from transformers import Cache, PreTrainedModel

from hf_paged.memory.kv_format import KV_FORMATS


def round_kv(model: PreTrainedModel, dtype: str) -> None:
    """Have every cache that `model` is given store keys and values cast to `dtype` and back, without a scale.

    The pages keep their own dtype: this shows the cost of the rounding, not the memory that it saves.

    Raises
    ------
    ValueError
        If torch has no such dtype, or it holds no fractions.
    """
    target = getattr(torch, dtype, None)
    if not isinstance(target, torch.dtype) or not target.is_floating_point:
        names = ", ".join(KV_FORMATS)
        raise ValueError(
            f"kv_dtype must be a KV format ({names}) or a floating-point dtype of torch, such as float8_e5m2; "
            f"got {dtype!r}"
        )

    def hook(module, args, kwargs):
        for cache in kwargs.values():  # transformers has two names for it.
            if isinstance(cache, Cache) and not isinstance(cache, _Rounding):
                # Its class, not its method: a method that holds its cache is a cycle, and would keep blocks until gc.
                cache.__class__ = _rounding(type(cache), target)

    model.register_forward_pre_hook(hook, with_kwargs=True)


class _Rounding:
    """Comes before a cache class."""

    target: torch.dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return super().update(self._rounded(key_states), self._rounded(value_states), *args, **kwargs)

    def _rounded(self, states: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(self.target).max
        return states.clamp(-limit, limit).to(self.target).to(states.dtype)


@functools.cache
def _rounding(kind: type[Cache], target: torch.dtype) -> type[Cache]:
    return type(kind.__name__, (_Rounding, kind), {"target": target})
