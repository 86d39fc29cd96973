"""A dense cache that rounds its states as pages of a KV format do: what quantised pages are compared with."""

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_paged import PagedConfig
from hf_paged.memory.kv_format import KVFormat, make_kv_format


class _RoundedLayer:
    kv_format: KVFormat

    def update(self, key_states, value_states, *args, **kwargs):
        key_states, value_states = (
            self.kv_format.decode(self.kv_format.encode(states, is_key), is_key)
            for states, is_key in ((key_states, True), (value_states, False))
        )
        return super().update(key_states, value_states, *args, **kwargs)


class RoundedFull(_RoundedLayer, DynamicLayer):
    pass


class RoundedSliding(_RoundedLayer, DynamicSlidingWindowLayer):
    pass


def rounded_cache(model, kv_dtype, kv_dtype_window=None) -> DynamicCache:
    """A dense cache that rounds what it is given before anything attends to it, the states of a prompt as well."""
    cache, dtypes = DynamicCache(config=model.config), PagedConfig(kv_dtype=kv_dtype, kv_dtype_window=kv_dtype_window)
    for index, layer in enumerate(cache.layers):
        window = getattr(layer, "sliding_window", None)
        rounded = RoundedFull() if window is None else RoundedSliding(sliding_window=window)
        rounded.kv_format = make_kv_format(model.dtype, window, dtypes)
        cache.layers[index] = rounded
    return cache
