"""Stored states: everything a layer holds, as cross-attention reads it again at every step.

Encoder-decoders compute the keys and values of the encoder's output once and then take them from the
cache's layers (``layer.keys``). Inside a forward they get handles, so that the pages are read in place.
"""

import torch

from hf_paged.cache.lazy_tensors import LazyTensor, PagedMask
from hf_paged.compat.torch import make_wrapper_subclass
from hf_paged.compat.transformers import bidirectional_mask_function
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.reasons import Reason, Why


class StoredStates(LazyTensor):
    """Keys or values ``[batch, num_kv_heads, positions, head_dim]`` of a whole layer, in its pages.

    Dense for good as soon as a model wants them dense: what is read at every step is not gathered twice.

    Attributes
    ----------
    layer : PagedLayer
    is_key : bool
    rows : GroupRows
        Where the layer is stored.
    """

    keeps_changes = True

    @staticmethod
    def __new__(cls, layer, is_key: bool) -> "StoredStates":
        rows = layer.batch.group_rows(layer.index)
        storage = rows.group.layers[layer.index]
        length = layer.batch.length(layer.index)
        shape = (layer.batch.batch_size, storage.num_kv_heads, layer.num_retained(length), storage.head_dim(is_key))
        self = make_wrapper_subclass(cls, shape, dtype=storage.states_dtype, device=storage.device)
        self.layer, self.is_key, self.rows, self.stored_at = layer, is_key, rows, rows.version
        return self

    def __repr__(self):
        return f"StoredStates(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.layer.index})"

    def check(self) -> None:
        """Refuse to be read after the cache has changed."""
        if self.layer.is_paged and self.stored_at != self.rows.version:
            raise RuntimeError(
                "keys or values of a paged cache are read after the cache has changed: read them from its layer again"
            )

    def dense(self, reason: Why) -> torch.Tensor:
        self.check()
        if self.layer.is_paged:
            self.layer.become_dense(reason)
        return self.layer.keys if self.is_key else self.layer.values


def stored_obstacle(module, query, key, value, mask, kwargs) -> Why | None:
    """Why attention cannot read stored keys and values in place; None if it can."""
    if not (isinstance(key, StoredStates) and isinstance(value, StoredStates) and key.layer is value.layer):
        return Reason.TWO_SOURCES
    batch = key.layer.batch
    if query.shape[0] != key.shape[0] or key.layer.window is not None or batch.padding.valid is not None:
        return Reason.PARTLY_STORED
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and is_causal and query.shape[2] > 1:
        return Reason.NOT_BIDIRECTIONAL
    fits = isinstance(mask, PagedMask) and mask.visible_lens is not None and mask.shape[3] == key.shape[2]
    if mask is not None and not fits:
        return Reason.CUSTOM_MASK
    bias = kwargs.get("position_bias")
    # T5 hands zeros to its cross-attention.
    return Reason.POSITION_BIAS if bias is not None and bool(bias.any()) else None


def stored_metadata(layer, queries: int, mask: PagedMask | None) -> AttentionMetadata:
    """How `queries` tokens of every row read all that the layer holds.

    The op is causal: a query sees what comes before it, so each query is a row of its own that comes last.
    """
    rows, batch = layer.batch.group_rows(layer.index), layer.batch
    lens = [batch.length(layer.index)] * len(rows.tables) if mask is None else mask.visible_lens
    state = (rows.version, queries, tuple(lens))
    if rows.stored_metadata is None or rows.stored_metadata[0] != state:
        # One for all layers of a forward, and for all forwards between two reorderings.
        rows.stored_metadata = (state, _make_metadata(rows, queries, lens))
    return rows.stored_metadata[1]


def _make_metadata(rows, queries: int, lens: list[int]) -> AttentionMetadata:
    device = rows.group.key.device
    width = max(len(table.blocks) for table in rows.tables)
    tables = torch.tensor([table.blocks + [0] * (width - len(table.blocks)) for table in rows.tables], device=device)
    context_lens = torch.tensor(lens, dtype=torch.long, device=device)
    return AttentionMetadata(
        context_lens.new_empty(0),  # Nothing is stored.
        tables.repeat_interleave(queries, 0),
        context_lens.repeat_interleave(queries),
        torch.arange(len(lens) * queries + 1, device=device),
        window=None,
    )


def visible_lens(mask_function, columns: torch.Tensor | None, positions: int) -> list[int] | None:
    """Tokens that every query sees, from the front, under a bidirectional mask; None if it is anything else.

    Parameters
    ----------
    mask_function : callable
        Of the mask, as transformers builds it.
    columns : torch.Tensor or None
        ``[batch, positions]`` bool, False at padding.
    positions : int
        Keys that the mask spans.
    """
    if mask_function is not bidirectional_mask_function or columns is None or columns.shape[1] != positions:
        return None
    if bool((columns[:, 1:] & ~columns[:, :-1]).any()):
        return None
    return columns.sum(1).tolist()
