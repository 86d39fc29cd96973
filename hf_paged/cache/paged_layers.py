"""Paged layers that live inside transformers' own `DynamicCache`."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_paged.cache.batch_state import BatchState
from hf_paged.cache.layers import PagedLayerMixin
from hf_paged.models import forward_context
from hf_paged.reasons import Why


@torch.compiler.disable
def page_layers(cache: DynamicCache) -> None:
    """Replace the attention layers of a new, empty cache by paged ones that share their `BatchState`.

    Linear-attention, indexer and dummy layers stay upstream's own.
    """
    sequences = BatchState(born_in_forward=forward_context.running_forward() is not None)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = PagedLayer(sequences, index)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = PagedSlidingWindowLayer(sequences, index, layer.sliding_window)
    sequences.num_layers = sum(isinstance(layer, PagedLayerMixin) for layer in cache.layers)


class PagedLayer(PagedLayerMixin, DynamicLayer):
    """A full-attention layer whose keys and values lie in pages.

    Parameters
    ----------
    sequences : BatchState
        Rows of the cache this layer belongs to.
    index : int
        Its position in the cache.
    """

    def __init__(self, sequences: BatchState, index: int):
        super().__init__()
        self._init_paged(sequences, index)

    def crop(self, tokens_to_remove: int) -> None:
        self._take_all_edits()
        if not self.is_paged or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        elif tokens_to_remove < 0:
            self.sequences.store_held()
            self.sequences.truncate(self.index, None, -tokens_to_remove)
            self._crop_handed_out(-tokens_to_remove)


class PagedSlidingWindowLayer(PagedLayerMixin, DynamicSlidingWindowLayer):
    """A sliding-window layer in pages: blocks that left the window are freed, unless the past is recorded.

    Parameters
    ----------
    sequences : BatchState
        Rows of the cache this layer belongs to.
    index : int
        Its position in the cache.
    sliding_window : int
        Tokens that a query sees, itself included.
    """

    def __init__(self, sequences: BatchState, index: int, sliding_window: int):
        super().__init__(sliding_window=sliding_window)
        self.window = sliding_window
        self._init_paged(sequences, index)
        self._recorded = 0  # Positions seen since the last crop.

    @property
    def cumulative_length(self) -> int:
        return self.sequences.length(self.index) if self.is_paged else self.__dict__["_cumulative_length"]

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._cumulative_length = length

    @property
    def is_paged(self) -> bool:
        return self.__dict__.get("is_dense") is False and super().is_paged

    def become_dense(self, reason: Why) -> None:
        length = self.get_seq_length()
        super().become_dense(reason)
        self.cumulative_length = length

    def __getstate__(self):
        return {**super().__getstate__(), "_cumulative_length": self.get_seq_length()}

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        if not self.is_dense:
            self.sequences.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        self._take_all_edits()
        outgrown = self.get_seq_length() >= self.window and not self.record_past
        if not self.is_paged or tokens_to_remove > 0 or outgrown:
            super().crop(tokens_to_remove)  # Where the layer is paged, upstream raises and says why.
        else:
            self.sequences.store_held()
            self.sequences.truncate(self.index, self.window, -tokens_to_remove)
            self._recorded = 0
            self._crop_handed_out(-tokens_to_remove)

    def _visible(self, length: int) -> int:
        return min(length, self.window - 1)

    def _advance(self, positions: int) -> None:
        self._recorded += positions

    def _retained(self, length: int) -> int:
        return min(length, self.window - 1 + (self._recorded if self.record_past else 0))
