"""Stored states: everything a layer holds, as cross-attention reads it again at every step.

Encoder-decoders compute the keys and values of the encoder's output once and then take them from the
cache's layers (``layer.keys``). Inside a forward they get handles, so that the pages are read in place.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_paged.cache.append_step import padded_block_tables
from hf_paged.cache.batch_state import GroupRows
from hf_paged.cache.lazy_tensors import LazyTensor, PagedMask
from hf_paged.compat.torch import make_wrapper_subclass
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.reasons import Why

if TYPE_CHECKING:
    from hf_paged.cache.layers import PagedLayer


class StoredStates(LazyTensor):
    """Keys or values ``[batch, num_kv_heads, positions, head_dim]`` of a whole layer, in its pages.

    Dense for good as soon as a model wants them dense: what is read at every step is not gathered twice.

    Attributes
    ----------
    layer : PagedLayer
    is_key : bool
        Keys, not values.
    rows : GroupRows
        Where the layer is stored.
    version : int
        Of `rows`, when the layer was read.
    """

    keeps_changes = True
    layer: "PagedLayer"
    is_key: bool
    rows: GroupRows
    version: int

    @staticmethod
    def __new__(cls, layer: "PagedLayer", is_key: bool) -> "StoredStates":
        rows = layer.batch.group_rows(layer.index)
        storage = rows.group.layers[layer.index]
        length = layer.batch.length(layer.index)
        shape = (layer.batch.batch_size, storage.num_kv_heads, layer.num_retained(length), storage.head_dim(is_key))
        self = make_wrapper_subclass(cls, shape, dtype=storage.states_dtype, device=storage.device)
        self.layer, self.is_key, self.rows, self.version = layer, is_key, rows, rows.version
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"StoredStates(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.layer.index})"

    def check(self) -> None:
        """Refuse to be read after the cache has changed."""
        if self.layer.is_paged and self.version != self.rows.version:
            raise RuntimeError(
                "keys or values of a paged cache are read after the cache has changed: read them from its layer again"
            )

    def dense(self, reason: Why) -> torch.Tensor:
        self.check()
        if self.layer.is_paged:
            self.layer.become_dense(reason)
        dense = self.layer.keys if self.is_key else self.layer.values
        assert dense is not None, "a layer that was stored has states"
        return dense


def stored_metadata(layer: "PagedLayer", queries: int, mask: PagedMask | None) -> AttentionMetadata:
    """Describe how `queries` tokens of every row read all that the layer holds.

    The op is causal: a query sees what comes before it, so each query is a separate row, of which it is the last token.
    """
    rows = layer.batch.group_rows(layer.index)
    lens = None if mask is None else mask.visible_lens
    if lens is None:
        lens = [layer.batch.length(layer.index)] * len(rows.tables)
    state = (rows.version, queries, tuple(lens))
    if rows.stored_metadata is None or rows.stored_metadata[0] != state:
        # One for all layers of a forward, and for all forwards between two reorderings.
        rows.stored_metadata = (state, _make_metadata(rows, queries, lens))
    return rows.stored_metadata[1]


def _make_metadata(rows: GroupRows, queries: int, lens: Sequence[int]) -> AttentionMetadata:
    device = rows.group.spec.device
    block_tables = padded_block_tables(rows.tables, device).repeat_interleave(queries, 0)
    context_lens = torch.tensor(lens, dtype=torch.long, device=device).repeat_interleave(queries)
    starts = torch.arange(len(lens) * queries + 1, device=device)
    return AttentionMetadata(context_lens.new_empty(0), block_tables, context_lens, starts, window=None)
