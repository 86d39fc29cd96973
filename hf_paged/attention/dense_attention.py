"""Attention over dense tensors, as the model would compute it without us: by sdpa, or by its own eager function."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_paged.attention.arguments import AttentionCall, wants_weights
from hf_paged.cache.lazy_tensors import PagedMask
from hf_paged.errors import UnsupportedError
from hf_paged.models import forward_context
from hf_paged.reasons import Reason


def dense_attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with the function that transformers would pick for the model.

    Parameters
    ----------
    call : AttentionCall
        With dense keys and values. Its options lose what an indexer chose.

    Returns
    -------
    (output, weights)
        Output ``[batch, queries, num_heads, value_dim]``; weights ``[batch, num_heads, queries, positions]``, or None
        from sdpa.

    Raises
    ------
    UnsupportedError
        If the model needs an eager function and has none.
    """
    mask = _pruned_by_indexer(call)
    if not _needs_eager(call):
        mask = mask.for_sdpa() if isinstance(mask, PagedMask) else mask
        attend, key, value = sdpa_attention_forward, call.key, call.value
    else:
        attend, mask = _eager_function(call.module), _additive(call, mask)
        key, value = call.key.contiguous(), call.value.contiguous()  # As they come out of a dense cache.
    return attend(call.module, call.query, key, value, mask, dropout=call.dropout, scaling=call.scaling, **call.options)


def _needs_eager(call: AttentionCall) -> bool:
    """Tell whether sdpa does not compute what is asked for."""
    forward = forward_context.current_forward()
    if forward is not None and not forward.supports_sdpa:
        return True
    return wants_weights(call.options) or call.options.get("softcap") is not None or call.sinks is not None


def _pruned_by_indexer(call: AttentionCall) -> torch.Tensor | None:
    """The mask without the tokens that the model's indexer did not choose.

    Models with an indexer prune the mask themselves for implementations named "eager" or "sdpa", and hand
    what was chosen to any other. Takes these arguments out of the call's options.
    """
    mask, query, positions = call.mask, call.query, call.key.shape[2]
    chosen, chosen_blocks = call.options.pop("indices", None), call.options.pop("block_indices", None)
    if chosen is None and chosen_blocks is None:
        return mask
    mask = mask.dense(Reason.INDEXER) if isinstance(mask, PagedMask) else mask
    if chosen_blocks is not None:
        at = call.options.get("position_ids")
        at = torch.arange(positions - query.shape[2], positions, device=query.device) if at is None else at
        at = at.view(-1, query.shape[2]).expand(len(query), -1)  # [batch, queries]
        indexer: Any = call.module.indexer
        return indexer.build_block_mask(chosen_blocks, mask, positions, query.dtype, query.device, at)
    assert mask is not None, "a model with an indexer builds a mask"
    visible = torch.zeros(len(query), query.shape[2], positions, dtype=torch.bool, device=query.device)
    visible = visible.scatter(-1, chosen.long(), True).unsqueeze(1)  # [batch, 1, queries, positions]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _eager_function(module: torch.nn.Module) -> Callable:
    """The eager attention function of the modelling file that `module`'s class, or a base of it, comes from."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"{type(module).__name__} asks for attention that sdpa does not compute (sinks, softcap, weights, or a model "
        'without sdpa), and its modelling file has no eager_attention_forward: load the model with "eager"'
    )


def _additive(call: AttentionCall, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as eager attention wants it: zero where a query sees a key, else the dtype's minimum."""
    query, positions = call.query, call.key.shape[2]
    if isinstance(mask, PagedMask):
        mask = mask.dense(Reason.EAGER)
    if mask is None and call.is_causal and query.shape[2] > 1:  # sdpa's reading of None.
        mask = torch.ones(query.shape[2], positions, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)
