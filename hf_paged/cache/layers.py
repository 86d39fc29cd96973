"""Paged layers: they stand in transformers' own `DynamicCache` and keep their states in pages."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_paged.cache.batch_state import BatchState, DeferredStates
from hf_paged.cache.cross_attention import StoredStates
from hf_paged.cache.duplicate_rows import first_equal_rows
from hf_paged.cache.edits import same_bits
from hf_paged.cache.lazy_tensors import PagedStates, PageView
from hf_paged.memory.kv_pool import KVCacheSpec
from hf_paged.models import forward_context, registry
from hf_paged.reasons import Reason, Why, count_and_log

_KEYS, _VALUES = 0, 1


class PagedLayer(DynamicLayer):
    """A layer whose keys and values lie in pages.

    A layer is paged until something asks for what pages cannot do (gradients through the cache, states
    of another dtype, an assignment to its keys); then it becomes the upstream layer it derives from, for
    good. Its blocks belong to `batch`.

    Parameters
    ----------
    batch : BatchState
        Rows of the cache this layer belongs to.
    index : int
        Its position in the cache.
    **upstream
        Arguments of the upstream layer.

    Attributes
    ----------
    window : int or None
        Tokens that a query sees, itself included; None: all.
    is_dense : bool
        True once the layer is upstream's. Never False again, but after `reset`.
    epoch : int
        Selections of rows that this layer was told of.
    dense_because : Reason or None
        Why the layer became upstream's, if it did so by itself.
    """

    window: int | None = None
    dense_because: Why | None = None
    is_dense = True  # While upstream's constructor runs.
    _dense: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    _is_detached = False  # Unpickled: without a `batch`.

    def __init__(self, batch: BatchState, index: int, **upstream):
        super().__init__(**upstream)
        self.batch, self.index = batch, index
        self.epoch = 0
        self.is_dense = False
        self._stored_layout: tuple | None = None  # Of the states that went into its pages.
        # Dense keys and values that were read since the layer last changed: the reader may edit them in place.
        self._handed_out: dict[int, torch.Tensor] = {}
        self._was_compared = False  # With its pages, when a sibling was told of the change this layer is told of next.

    @property
    def is_paged(self) -> bool:
        """Tell whether this layer has states, and they are in pages or deferred."""
        return not self.is_dense and self.batch.length(self.index) > 0

    @property
    def _is_stored(self) -> bool:
        """Tell whether states are in pages or deferred, or were and all of them have been cropped since."""
        return self.is_paged or any(self.index in rows.lengths for rows in self.batch.groups.values())

    @property
    def keys(self) -> torch.Tensor | None:
        return self._read(_KEYS)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign(_KEYS, states)

    @property
    def values(self) -> torch.Tensor | None:
        return self._read(_VALUES)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign(_VALUES, states)

    def _read(self, which: int) -> torch.Tensor | None:
        if self.is_dense or not self._is_stored:
            return self._dense[which]
        if not self.is_paged:
            return self._gather(which, Reason.CACHE_READ)
        if self.batch.deferred_states(self.index) is None and _is_read_by_model():
            self.take_edits()
            return self._dense[which] if self.is_dense else StoredStates(self, which == _KEYS)
        if which not in self._handed_out:
            self._hand_out(which, self._gather(which, Reason.CACHE_READ))
        return self._handed_out[which]

    def _assign(self, which: int, states: torch.Tensor | None) -> None:
        if self.is_paged:
            self.become_dense(Reason.CACHE_ASSIGNED)
        keys, values = self._dense
        self._dense = (states, values) if which == _KEYS else (keys, states)
        if isinstance(states, torch.Tensor) and states.numel() > 0:
            self.is_dense = True

    def _gather(self, which: int, reason: Why) -> torch.Tensor:
        """Copy what upstream's layer would hold out of the pages, ``[batch, num_kv_heads, retained, head_dim]``."""
        end = self.batch.length(self.index)
        start = end - self.num_retained(end)
        deferred = self.batch.deferred_states(self.index)
        if deferred is not None:
            return (deferred.key, deferred.value)[which][:, :, start:]
        if end > 0:
            count_and_log(self.batch.pool.gathers, reason, "keys or values are gathered")
        with torch.inference_mode(False), torch.no_grad():  # A reader may edit them, in whatever mode.
            return self.batch.gather(self.index, which == _KEYS, start, end)

    def num_retained(self, length: int) -> int:
        """Of the `length` positions seen, how many upstream's layer would still hold."""
        return length

    def become_dense(self, reason: Why) -> None:
        """Turn into the upstream layer with the same content; its blocks are given back."""
        keys, values = self._dense
        if self._is_stored:
            handed_out = self._forget_handed_out()
            keys, values = (
                handed_out[which] if which in handed_out else self._gather(which, reason) for which in (_KEYS, _VALUES)
            )
            self.batch.drop_layer(self.index)
        self.is_dense, self._dense, self.is_initialized = True, (keys, values), keys is not None
        self.dense_because = reason

    def take_edits(self) -> None:
        """Take over what a reader changed in the tensors handed out: the layer becomes dense with them."""
        if not self._handed_out or self.batch.deferred_states(self.index) is not None:
            return  # Deferred states are what was handed out.
        for which, states in self._handed_out.items():
            if not same_bits(states, self._gather(which, Reason.CACHE_READ)):
                self.become_dense(Reason.CACHE_EDITED)
                return

    def _take_all_edits(self) -> None:
        """Take over the edits of all layers, before the first of them changes what their pages have in common."""
        if self._is_detached or self._was_compared:
            self._was_compared = False
            return
        for layer in tuple(self.batch.read_layers):
            layer.take_edits()
            layer._was_compared = layer is not self

    def _hand_out(self, which: int, states: torch.Tensor) -> None:
        self._handed_out[which] = states
        self.batch.read_layers.add(self)

    def _forget_handed_out(self) -> dict[int, torch.Tensor]:
        handed_out, self._handed_out = self._handed_out, {}
        if handed_out:
            self.batch.read_layers.discard(self)
        return handed_out

    def forget_reads_before_rounding(self) -> None:
        """Forget dense states that were read before pages took them: those of a lossy format differ, unedited."""
        if not self.batch.group_rows(self.index).group.kv_format.is_lossless:
            self._forget_handed_out()

    def _crop_handed_out(self, removed: int) -> None:
        """After a crop a dense layer holds a part of the tensors that it held before."""
        kept = self.num_retained(self.batch.length(self.index))
        for which, states in self._handed_out.items():
            end = max(0, states.shape[2] - removed)
            self._handed_out[which] = states[:, :, max(0, end - kept) : end]

    def note_edit(self, is_key: bool, states: torch.Tensor) -> None:
        """Remember that a model edited what `update` returned, ``[batch, num_kv_heads, visible, head_dim]``."""
        which = _KEYS if is_key else _VALUES
        edited = self._gather(which, Reason.CACHE_EDITED).clone()
        kept = min(edited.shape[2], states.shape[2])
        edited[:, :, edited.shape[2] - kept :] = states[:, :, states.shape[2] - kept :]
        self._hand_out(which, edited)

    def __deepcopy__(self, memo):
        self._take_all_edits()
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            # The states of a paged layer are copied by copying the tables of its `batch`.
            other.__dict__[name] = {} if name == "_handed_out" else copy.deepcopy(value, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Pickled layers are dense: blocks mean nothing in another process."""
        dense = self.keys, self.values
        state = {**self.__dict__, "is_dense": True, "_is_detached": True, "_dense": dense, "_handed_out": {}}
        state.pop("batch", None)
        return state

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.is_dense:
            super().lazy_initialization(key_states, value_states)
            return
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the new states in pages and return handles on the keys and values so far.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            ``[batch, num_kv_heads, positions, head_dim]``; the head sizes may differ.

        Returns
        -------
        tuple of torch.Tensor
            `PagedStates` of shape ``[batch, num_kv_heads, all positions, head_dim]``, good until the next
            change of the cache; plain tensors where the layer is dense or nothing needs storing yet.

        Raises
        ------
        OutOfBlocksError
            If the blocks do not fit in memory.
        """
        self.take_edits()
        self._forget_handed_out()  # Upstream's layers concatenate: what was read is the cache's no longer.
        obstacle = None if self.is_dense else self._obstacle(key_states, value_states)
        if obstacle is not None:
            self.become_dense(obstacle)
        if self.is_dense:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, start = self.batch, self.batch.length(self.index)
        if start == 0:
            self._join(key_states)
            if batch.is_deferring:
                # Contiguous, as upstream's layers return them: some models rely on it.
                states = DeferredStates(key_states.contiguous(), value_states.contiguous(), self.window)
                batch.defer(self.index, states)
                self._note_appended(key_states.shape[2])
                return states.key, states.value
        elif batch.is_deferring:
            batch.store_deferred()
        visible = self._num_visible(start) + key_states.shape[2]
        rows, step = batch.append(self.index, self.window, key_states, value_states)
        self._stored_layout = _layout(key_states, value_states)
        self._note_appended(key_states.shape[2])
        view = PageView(batch, rows, step, self.index, rows.version, self)
        if start == 0:
            # Attention takes them from here, and must see what later steps, and packed rows, read in the pages.
            key_states = rows.group.kv_format.as_stored(key_states, True)
            value_states = rows.group.kv_format.as_stored(value_states, False)
        return PagedStates(view, key_states, True, visible), PagedStates(view, value_states, False, visible)

    def _obstacle(self, key: torch.Tensor, value: torch.Tensor) -> Why | None:
        """The reason why these states cannot go into pages; None if they can."""
        if not self.batch.is_bound and forward_context.running_forward() is None:
            return Reason.NO_MODEL
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return Reason.CACHE_GRADIENTS
        has_begun = self.batch.length(self.index) > 0
        if has_begun and self._stored_layout is not None and self._stored_layout == _layout(key, value):
            return None
        if key.is_meta or key.shape[:3] != value.shape[:3] or key.dtype != value.dtype:
            return Reason.UNLIKE_STATES
        if not has_begun and not self.batch.admits(key.shape[2]):
            return Reason.UNLIKE_SIBLINGS
        deferred = self.batch.deferred_states(self.index)
        if deferred is not None:
            is_like = deferred.key.dtype == key.dtype and deferred.key.device == key.device
            return None if is_like else Reason.CHANGED_PLACE
        expected = KVCacheSpec(self.window, key.dtype, key.device)
        for spec, rows in self.batch.groups.items():
            if self.index in rows.lengths and spec != expected:
                return Reason.CHANGED_PLACE
        group = self.batch.pool.groups.get(expected) if self.batch.is_bound else None
        storage = group.layers.get(self.index) if group is not None else None
        return None if storage is None or storage.accepts(key, value) else Reason.CHANGED_SHAPE

    def _join(self, key: torch.Tensor) -> None:
        """Enter the cache's common rows with the first states; the first layer ties them to the model."""
        batch, call = self.batch, forward_context.current_forward()
        self.epoch = batch.epoch
        if not batch.is_bound:
            assert call is not None, "outside a forward the layer has become dense"
            batch.bind(registry.pool_of(call.model))
        if batch.batch_size == 0:
            batch.batch_size = key.shape[0]
            batch.duplicate_of = self._find_duplicates(key)

    def _find_duplicates(self, key: torch.Tensor) -> list[int] | None:
        """For each row the first row with the same input; None if all rows differ, or may."""
        if key.shape[2] == 1:
            return None
        call = forward_context.current_forward()
        ids = None if call is None else call.inputs.get("input_ids", call.inputs.get(0))
        if not isinstance(ids, torch.Tensor) or ids.shape != (key.shape[0], key.shape[2]):
            ids = key[:, 0, :, 0]  # Not made from tokens, or from an encoder's: told apart by the states.
        return first_equal_rows(ids, self.batch.padding.valid_in(0, ids.shape[1]))

    def _num_visible(self, length: int) -> int:
        """Of the `length` positions seen, how many the next forward may see."""
        return length

    def _note_appended(self, positions: int) -> None:
        """Note that `positions` more were seen."""

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.is_dense else self.batch.length(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.take_edits()
        sizes = super().get_mask_sizes(query_length)
        if not self.is_dense and not torch.compiler.is_compiling():
            if self.is_paged:
                self.batch.store_deferred()
            forward_context.request_mask(self.batch, self.index, (query_length, *sizes))
        return sizes

    def reset(self) -> None:
        if not self.is_dense:
            self.batch.drop_layer(self.index)
        self._forget_handed_out()
        self.is_dense, self._dense = self._is_detached, (None, None)
        self._stored_layout = None
        self.is_initialized = False  # Older layers would write zeros to their keys, and keep their length.
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self._take_all_edits()
        if self.is_paged and self._is_cropped_by(tokens_to_remove):
            self._crop_pages(-tokens_to_remove)
        else:
            super().crop(tokens_to_remove)  # Where the layer is paged, it does nothing, or raises and says why.

    def _is_cropped_by(self, tokens_to_remove: int) -> bool:
        """Tell whether a crop changes what is stored."""
        return tokens_to_remove < 0

    def _crop_pages(self, removed: int) -> None:
        self.batch.store_deferred()
        self.batch.truncate(self.index, removed)
        self._crop_handed_out(removed)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)), super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_rows(lambda rows: rows[indices, ...], super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda rows: rows.repeat_interleave(repeats, dim=0), super().batch_repeat_interleave, repeats)

    def _select_rows(self, choose: Callable, upstream: Callable, argument: Any) -> None:
        """Copy the tables of the rows that `choose` picks of ``[batch, 1, 1, 1]``; `upstream` does it to a dense layer.

        `choose` does to row numbers what upstream's layer does to its tensors, so it raises what that raises.
        """
        self._take_all_edits()
        if self.is_paged:
            rows = choose(torch.arange(self.batch.batch_size_at(self.epoch + 1)).view(-1, 1, 1, 1))
            if rows.dim() != 4 or len(rows) == 0:
                self.become_dense(Reason.ODD_SELECTION)
        if not self.is_paged:
            upstream(argument)
            return
        self.batch.store_deferred()
        self.epoch += 1
        self.batch.select_rows(self.epoch, rows.flatten())
        # A slice of a dense tensor is a view of it, anything else a copy.
        for which, states in self._forget_handed_out().items():
            if isinstance(argument, slice):
                self._hand_out(which, states[argument])


class PagedSlidingWindowLayer(PagedLayer, DynamicSlidingWindowLayer):
    """A sliding-window layer in pages: blocks that left the window are freed, unless the past is recorded.

    Parameters
    ----------
    batch : BatchState
        Rows of the cache this layer belongs to.
    index : int
        Its position in the cache.
    sliding_window : int
        Tokens that a query sees, itself included.
    """

    window: int

    def __init__(self, batch: BatchState, index: int, sliding_window: int):
        super().__init__(batch, index, sliding_window=sliding_window)
        self.window = sliding_window
        self._recorded = 0  # Positions seen since the last crop.

    @property
    def cumulative_length(self) -> int:
        return self.batch.length(self.index) if self.is_paged else self._cumulative_length

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._cumulative_length = length

    def become_dense(self, reason: Why) -> None:
        length = self.get_seq_length()
        super().become_dense(reason)
        self.cumulative_length = length

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cumulative_length": self.get_seq_length()}

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        if not self.is_dense:
            self.batch.record_past = True

    def _is_cropped_by(self, tokens_to_remove: int) -> bool:
        # A crop of no tokens frees the past that was recorded.
        return tokens_to_remove <= 0 and (self.record_past or self.get_seq_length() < self.window)

    def _crop_pages(self, removed: int) -> None:
        self._recorded = 0
        super()._crop_pages(removed)

    def _num_visible(self, length: int) -> int:
        return min(length, self.window - 1)

    def _note_appended(self, positions: int) -> None:
        self._recorded += positions

    def num_retained(self, length: int) -> int:
        return min(length, self.window - 1 + (self._recorded if self.record_past else 0))


@torch.compiler.disable
def page_layers(cache: DynamicCache) -> None:
    """Replace the attention layers of a new, empty cache by paged ones that share their `BatchState`.

    Linear-attention, indexer and dummy layers stay upstream's own.

    Parameters
    ----------
    cache : DynamicCache
        Changed in place.
    """
    batch = BatchState(is_deferring=forward_context.running_forward() is not None)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = PagedLayer(batch, index)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = PagedSlidingWindowLayer(batch, index, layer.sliding_window)
    batch.num_layers = sum(isinstance(layer, PagedLayer) for layer in cache.layers)


def _layout(key: torch.Tensor, value: torch.Tensor) -> tuple | None:
    """Dtype, device and sizes that states must share to go into the same pages; None if these cannot go into any."""
    if key.shape[:3] != value.shape[:3]:
        return None
    return key.dtype, value.dtype, key.device, key.shape[1], key.shape[3], value.shape[3]


def _is_read_by_model() -> bool:
    """Tell whether a model's forward reads a layer: it gets a handle on the pages, any other reader a tensor."""
    return not torch.compiler.is_compiling() and forward_context.running_forward() is not None
