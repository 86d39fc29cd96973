"""The "paged" attention function: which calls read the pages, which go dense, and why."""

import torch

from hf_paged.attention.arguments import AttentionCall, check_arguments, wants_weights
from hf_paged.attention.dense_attention import dense_attention
from hf_paged.cache.cross_attention import StoredStates, stored_metadata
from hf_paged.cache.lazy_tensors import LazyTensor, PagedMask, PagedStates
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.execution.packed_cache import PACKED_FORWARD, NotPackableError, PackedForward, is_packed_mask
from hf_paged.memory.kv_pool import KVPool
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import forward_context
from hf_paged.reasons import Reason, Why


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, num_heads, queries, key_dim]
    key: torch.Tensor,  # [batch, num_kv_heads, positions, key_dim]
    value: torch.Tensor,  # [batch, num_kv_heads, positions, value_dim]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend for a "paged" model: transformers' `AttentionInterface` calls it in every layer.

    Reads the pages where keys, values and mask come from a paged cache and ask for nothing but causal
    attention, with or without window, softcap, sinks and padding. Every other call gets what sdpa, or
    the model's own eager function, computes from the dense tensors.

    Returns
    -------
    (output, weights)
        Output ``[batch, queries, num_heads, value_dim]``; weights only where eager attention gives them.

    Raises
    ------
    UnsupportedError
        If the model passes an attention argument that is not known.
    NotPackableError
        If the call belongs to a packed step that cannot serve it.
    """
    packed: PackedForward | None = kwargs.pop(PACKED_FORWARD, None)
    if packed is None or not torch.compiler.is_compiling():  # An engine's first steps are never compiled.
        check_arguments(module, kwargs)
    if packed is not None:
        return _attend_packed(packed, module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    if is_packed_mask(attention_mask):
        raise NotPackableError(Reason.LOST_KEYWORDS)
    call = AttentionCall(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if isinstance(key, StoredStates) or isinstance(value, StoredStates):
        return _attend_stored(call)
    if isinstance(key, PagedStates) or isinstance(value, PagedStates):
        return _attend_updated(call)
    return dense_attention(call)


def _attend_packed(packed: PackedForward, module, query, key, value, mask, dropout, scaling, options) -> torch.Tensor:
    """Attention in a packed step, or an error that sends the model to the rectangular loop."""
    obstacle = _kernel_obstacle(query, dropout, options)
    if options.get("position_bias") is not None:
        obstacle = Reason.POSITION_BIAS
    if options.get("is_causal") is False:
        obstacle = Reason.NOT_CAUSAL
    if obstacle is not None:
        raise NotPackableError(obstacle)
    return packed.attend(module, query, key, value, mask, scaling, options)


def _attend_updated(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over what a paged layer returned from `update`."""
    edits = [states.take_edits() for states in (call.key, call.value) if isinstance(states, PagedStates)]
    obstacle = _obstacle(call) or (Reason.CACHE_EDITED if any(edits) else None)
    if obstacle is not None:
        return _attend_densely(call, obstacle)
    key, value, mask = call.key, call.value, call.mask
    assert isinstance(key, PagedStates) and isinstance(value, PagedStates), "anything else is an obstacle"
    assert isinstance(mask, PagedMask) and mask.pattern is not None, "anything else is an obstacle"
    view = key.pages
    if view.step.start == 0:
        # Nothing lies in the pages that the new states do not hold: read these, as sdpa does.
        call.key, call.value = key.fresh, value.fresh
        return dense_attention(call)
    view.check()
    storage, metadata = view.rows.group.layers[view.layer], view.step.metadata(mask.pattern.window)
    return _read_pages(call, view.batch.pool, storage, metadata), None


def _attend_stored(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over all that a layer holds, such as cross-attention after its first step."""
    obstacle = _stored_obstacle(call)
    if obstacle is not None:
        return _attend_densely(call, obstacle)
    key, mask = call.key, call.mask
    assert isinstance(key, StoredStates) and (mask is None or isinstance(mask, PagedMask)), "else it is an obstacle"
    key.check()
    storage, metadata = key.rows.group.layers[key.layer.index], stored_metadata(key.layer, call.query.shape[2], mask)
    return _read_pages(call, key.layer.batch.pool, storage, metadata), None


def _attend_densely(call: AttentionCall, reason: Why) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over keys and values that are taken out of their pages because of `reason`."""
    call.key, call.value = (
        states.dense(reason) if isinstance(states, LazyTensor) else states for states in (call.key, call.value)
    )
    return dense_attention(call)


def _obstacle(call: AttentionCall) -> Why | None:
    """The reason why the pages of an update cannot be read; None if they can."""
    query, key, value, mask, options = call.query, call.key, call.value, call.mask, call.options
    if not (isinstance(key, PagedStates) and isinstance(value, PagedStates) and key.pages is value.pages):
        return Reason.TWO_SOURCES
    if not isinstance(mask, PagedMask):
        return Reason.NO_MASK if mask is None else Reason.CUSTOM_MASK
    view, step = key.pages, key.pages.step
    if mask.shape[2:] != (step.end - step.start, key.shape[2]) or mask.offset != step.end - key.shape[2]:
        return Reason.OTHER_WINDOW
    if query.shape[0] != key.shape[0] or query.shape[2] != step.end - step.start:
        return Reason.OTHER_QUERIES
    if mask.pattern is None or options.get("is_causal") is False:
        return Reason.NOT_CAUSAL
    if view.rows.window is not None and mask.pattern.window != view.rows.window:
        return Reason.OTHER_WINDOW
    if options.get("position_bias") is not None:
        return Reason.POSITION_BIAS
    return _kernel_obstacle(query, call.dropout, options) or (
        mask.obstacle or (Reason.INNER_PADDING if step.has_inner_padding else None)
    )


def _stored_obstacle(call: AttentionCall) -> Why | None:
    """The reason why the pages of a whole layer cannot be read; None if they can."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    if not (isinstance(key, StoredStates) and isinstance(value, StoredStates) and key.layer is value.layer):
        return Reason.TWO_SOURCES
    if query.shape[0] != key.shape[0] or key.layer.window is not None or key.layer.batch.padding.valid is not None:
        return Reason.PARTLY_STORED
    if mask is None and call.is_causal and query.shape[2] > 1:
        return Reason.NOT_BIDIRECTIONAL
    fits = isinstance(mask, PagedMask) and mask.visible_lens is not None and mask.shape[3] == key.shape[2]
    if mask is not None and not fits:
        return Reason.CUSTOM_MASK
    bias = call.options.get("position_bias")
    if bias is not None and bool(bias.any()):  # T5 hands zeros to its cross-attention.
        return Reason.POSITION_BIAS
    return _kernel_obstacle(query, call.dropout, call.options)


def _kernel_obstacle(query: torch.Tensor, dropout: float, options: dict) -> Why | None:
    """The reason why no kernel over pages computes this, whatever the keys and the mask are; None if one does."""
    if options.get("indices") is not None or options.get("block_indices") is not None:
        return Reason.INDEXER
    if wants_weights(options):
        return Reason.OUTPUT_ATTENTIONS
    if dropout:
        return Reason.DROPOUT
    if torch.is_grad_enabled() and query.requires_grad:
        return Reason.GRADIENTS
    if not _says_all_in_arguments():
        return Reason.EAGER_ONLY
    return None


def _says_all_in_arguments() -> bool:
    """Tell whether the running model supports fused attention, and so hides nothing in its eager function."""
    call = forward_context.current_forward()
    return call is not None and call.supports_fused


def _read_pages(call: AttentionCall, pool: KVPool, storage: KVStorage, metadata: AttentionMetadata) -> torch.Tensor:
    """Attend over pages. Returns ``[batch, queries, num_heads, value_dim]``, zeros for queries that are padding."""
    pool.page_reads += 1
    with on_home_stream(storage.device) as lend:
        return lend(_attend_through_pages(call, storage, metadata))


def _attend_through_pages(call: AttentionCall, storage: KVStorage, metadata: AttentionMetadata) -> torch.Tensor:
    batch, num_heads, queries, head_dim = call.query.shape
    tokens = call.query.transpose(1, 2).reshape(batch * queries, num_heads, head_dim)
    if metadata.query_index is not None:
        tokens = tokens.index_select(0, metadata.query_index)
    out = storage.attend(
        tokens,
        metadata.block_tables,
        metadata.context_lens,
        metadata.cu_seqlens_q,
        head_dim**-0.5 if call.scaling is None else call.scaling,
        metadata.window,
        call.options.get("softcap"),
        call.sinks,
    )
    if metadata.query_index is not None:
        packed, out = out, out.new_zeros(batch * queries, num_heads, out.shape[-1])
        out.index_copy_(0, metadata.query_index, packed)
    return out.view(batch, queries, num_heads, -1)
