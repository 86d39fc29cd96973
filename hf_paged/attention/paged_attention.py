"""The "paged" attention function: which calls read the pages, which go dense, and why."""

import inspect
import sys

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import TransformersKwargs

from hf_paged.cache.cross_attention import StoredStates, stored_metadata, stored_obstacle
from hf_paged.cache.lazy_tensors import PagedMask, PagedStates
from hf_paged.compat.transformers import output_collector
from hf_paged.errors import UnsupportedError
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.execution.packed_cache import PACKED_FORWARD, NotPackableError, PackedForward, is_packed_mask
from hf_paged.memory.kv_pool import KVPool
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import forward_context
from hf_paged.reasons import Reason, Why

# Every argument that a model of transformers 5.23 hands to its attention function and that the paths
# below, or the sdpa and eager functions they call, take into account or may ignore as those do.
_KNOWN_ARGUMENTS = {
    "is_causal", "sliding_window", "position_bias", "output_attentions", "s_aux", "sinks", "softcap",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "deterministic",
    "indices", "block_indices", PACKED_FORWARD,
}  # fmt: skip

# Flags of models and decoder layers, which many hand to their attention with every other keyword.
_MODEL_FLAGS = set(TransformersKwargs.__annotations__) | {
    "use_cache",
    "return_dict",
    "position_embeddings",
    "cache_position",
    "layer_idx",
}


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
    """What `AttentionInterface` calls for a "paged" model.

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
    """
    packed: PackedForward | None = kwargs.pop(PACKED_FORWARD, None)
    if packed is None or not torch.compiler.is_compiling():  # An engine's first steps are never compiled.
        _check_arguments(module, kwargs)
    if packed is not None:
        return _attend_packed(packed, module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    if is_packed_mask(attention_mask):
        raise NotPackableError(Reason.LOST_KEYWORDS)
    if isinstance(key, StoredStates) or isinstance(value, StoredStates):
        return _attend_stored(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if not isinstance(key, PagedStates) and not isinstance(value, PagedStates):
        return _dense(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    edits = [states.take_edits() for states in (key, value) if isinstance(states, PagedStates)]
    obstacle = _obstacle(query, key, value, attention_mask, dropout, kwargs)
    if obstacle is None and any(edits):
        obstacle = Reason.CACHE_EDITED
    if obstacle is not None:
        key, value = (x.dense(obstacle) if isinstance(x, PagedStates) else x for x in (key, value))
        return _dense(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if key.pages.step.start == 0:
        # Nothing lies in the pages that the new states do not hold: read these, as sdpa does.
        return _dense(module, query, key.fresh, value.fresh, attention_mask, dropout, scaling, kwargs)
    view = key.pages
    view.check()
    storage, metadata = view.rows.group.layers[view.layer], view.step.metadata(attention_mask.pattern.window)
    return _read_pages(query, view.batch.pool, storage, metadata, scaling, kwargs), None


def _attend_packed(packed: PackedForward, module, query, key, value, mask, dropout, scaling, kwargs) -> torch.Tensor:
    """Attention in a packed step, or an error that sends the model to the rectangular loop."""
    obstacle = _general_obstacle(query, dropout, kwargs)
    if kwargs.get("position_bias") is not None:
        obstacle = Reason.POSITION_BIAS
    if kwargs.get("is_causal") is False:
        obstacle = Reason.NOT_CAUSAL
    if obstacle is not None:
        raise NotPackableError(obstacle)
    return packed.attend(module, query, key, value, mask, scaling, kwargs)


def _attend_stored(module, query, key, value, mask, dropout, scaling, kwargs):
    """Attention over all that a layer holds, such as cross-attention after its first step."""
    obstacle = stored_obstacle(module, query, key, value, mask, kwargs) or _general_obstacle(query, dropout, kwargs)
    if obstacle is not None:
        key, value = (x.dense(obstacle) if isinstance(x, StoredStates) else x for x in (key, value))
        return _dense(module, query, key, value, mask, dropout, scaling, kwargs)
    key.check()
    storage, metadata = key.rows.group.layers[key.layer.index], stored_metadata(key.layer, query.shape[2], mask)
    return _read_pages(query, key.layer.batch.pool, storage, metadata, scaling, kwargs), None


def _check_arguments(module: torch.nn.Module, kwargs: dict) -> None:
    unknown = [name for name in kwargs if name not in _KNOWN_ARGUMENTS and name not in _MODEL_FLAGS]
    unknown = [name for name in unknown if kwargs[name] is not None and _means_something(type(module), name)]
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention function, which "
            'attn_implementation="paged" does not know and will not ignore: load the model with "sdpa" or "eager"'
        )


def _means_something(kind: type, name: str) -> bool:
    """Tell whether an attention argument is the model's own: the caller's keywords travel beside it and mean nothing.

    Dynamo does not see the calls of models within models, so there the code of the attention module is asked.
    """
    if torch.compiler.is_compiling():
        return _is_named_by(kind, name)
    call = forward_context.current_forward()
    return call is None or name not in call.inputs


@torch.compiler.assume_constant_result
def _is_named_by(kind: type, name: str) -> bool:
    """Tell whether the code of a module's class has `name` among its words, as it must to give the keyword a value."""
    bases = [base for base in kind.__mro__ if base not in torch.nn.Module.__mro__]
    functions = [member for base in bases for member in vars(base).values() if inspect.isfunction(member)]
    words = {word for function in functions for word in function.__code__.co_consts}  # Keywords of a call are a tuple.
    return any(name == word or (isinstance(word, tuple) and name in word) for word in words)


def _obstacle(query, key, value, mask, dropout, kwargs) -> Why | None:
    """Why this call cannot read the pages; None if it can."""
    if not (isinstance(key, PagedStates) and isinstance(value, PagedStates) and key.pages is value.pages):
        return Reason.TWO_SOURCES
    if not isinstance(mask, PagedMask):
        return Reason.NO_MASK if mask is None else Reason.CUSTOM_MASK
    view, step = key.pages, key.pages.step
    if mask.shape[2:] != (step.end - step.start, key.shape[2]) or mask.offset != step.end - key.shape[2]:
        return Reason.OTHER_WINDOW
    if query.shape[0] != key.shape[0] or query.shape[2] != step.end - step.start:
        return Reason.OTHER_QUERIES
    if mask.pattern is None or kwargs.get("is_causal") is False:
        return Reason.NOT_CAUSAL
    if view.rows.window is not None and mask.pattern.window != view.rows.window:
        return Reason.OTHER_WINDOW
    if kwargs.get("position_bias") is not None:
        return Reason.POSITION_BIAS
    return _general_obstacle(query, dropout, kwargs) or (
        mask.obstacle or (Reason.INNER_PADDING if step.has_inner_padding else None)
    )


def _general_obstacle(query, dropout, kwargs) -> Why | None:
    """What no kernel over pages computes, whatever the keys and the mask are."""
    if kwargs.get("indices") is not None or kwargs.get("block_indices") is not None:
        return Reason.INDEXER
    if _wants_weights(kwargs):
        return Reason.OUTPUT_ATTENTIONS
    if dropout:
        return Reason.DROPOUT
    if torch.is_grad_enabled() and query.requires_grad:
        return Reason.GRADIENTS
    if not _says_all_in_arguments():
        return Reason.EAGER_ONLY
    return None


def _wants_weights(kwargs: dict) -> bool:
    """Whether the caller asked for attention weights; not every model passes the argument down."""
    return bool(kwargs.get("output_attentions")) or "attentions" in (output_collector.get() or ())


def _says_all_in_arguments() -> bool:
    """Whether the running model supports fused attention, and so hides nothing in its eager function."""
    call = forward_context.current_forward()
    return call is not None and call.supports_fused


def _read_pages(query, pool: KVPool, storage: KVStorage, metadata: AttentionMetadata, scaling, kwargs) -> torch.Tensor:
    batch, num_heads, positions, head_dim = query.shape
    tokens = query.transpose(1, 2).reshape(batch * positions, num_heads, head_dim)
    if metadata.query_index is not None:
        tokens = tokens.index_select(0, metadata.query_index)
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    out = storage.attend(
        tokens,
        metadata.block_tables,
        metadata.context_lens,
        metadata.cu_seqlens_q,
        head_dim**-0.5 if scaling is None else scaling,
        metadata.window,
        kwargs.get("softcap"),
        sinks,
    )
    pool.page_reads += 1
    if metadata.query_index is not None:
        packed, out = out, out.new_zeros(batch * positions, num_heads, out.shape[-1])
        out.index_copy_(0, metadata.query_index, packed)
    return out.view(batch, positions, num_heads, -1)


def _dense(module, query, key, value, mask, dropout, scaling, kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over dense tensors, by the function the model would use without us."""
    mask = _chosen_by_indexer(module, query, key.shape[2], mask, kwargs)
    call = forward_context.current_forward()
    fused = call is None or call.supports_sdpa
    extras = (kwargs.get(name) for name in ("softcap", "s_aux", "sinks"))
    wants_eager = not fused or _wants_weights(kwargs) or any(extra is not None for extra in extras)
    if not wants_eager:
        mask = mask.for_sdpa() if isinstance(mask, PagedMask) else mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    eager = _eager_function(module)
    mask = _additive(module, query, key, mask, kwargs)
    key, value = key.contiguous(), value.contiguous()  # As they come out of a dense cache.
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _chosen_by_indexer(module, query, positions, mask, kwargs) -> torch.Tensor | None:
    """The mask without the tokens that the model's indexer did not choose.

    Models with an indexer prune the mask themselves for implementations named "eager" or "sdpa", and hand
    what was chosen to any other. Takes these arguments out of `kwargs`.
    """
    chosen, chosen_blocks = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if chosen is None and chosen_blocks is None:
        return mask
    mask = mask.dense(Reason.INDEXER) if isinstance(mask, PagedMask) else mask
    if chosen_blocks is not None:
        at = kwargs.get("position_ids")
        at = torch.arange(positions - query.shape[2], positions, device=query.device) if at is None else at
        at = at.view(-1, query.shape[2]).expand(len(query), -1)
        return module.indexer.build_block_mask(chosen_blocks, mask, positions, query.dtype, query.device, at)
    visible = torch.zeros(len(query), query.shape[2], positions, dtype=torch.bool, device=query.device)
    visible = visible.scatter(-1, chosen.long(), True).unsqueeze(1)  # [batch, 1, queries, positions]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _eager_function(module: torch.nn.Module):
    """The eager attention function of the modelling file that `module`'s class, or a base of it, comes from."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"{type(module).__name__} asks for attention that sdpa does not compute (sinks, softcap, weights, or a model "
        'without sdpa), and its modelling file has no eager_attention_forward: load the model with "eager"'
    )


def _additive(module, query, key, mask, kwargs) -> torch.Tensor | None:
    """The mask as eager attention wants it: zero where a query sees a key, else the dtype's minimum."""
    if isinstance(mask, PagedMask):
        mask = mask.dense(Reason.EAGER)
    queries, positions = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and is_causal and queries > 1:  # sdpa's reading of None.
        mask = torch.ones(queries, positions, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)
