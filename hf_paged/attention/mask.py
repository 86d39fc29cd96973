"""The "paged" mask function: it learns where the padding is, and makes no mask unless an operation reads it."""

import functools
import inspect
from collections.abc import Callable

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_paged.cache.lazy_tensors import MaskPattern, PagedMask
from hf_paged.compat.transformers import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    intersected_masks,
    sliding_window_of,
)
from hf_paged.execution.packed_cache import PACKED_OFFSET, NotPackableError, packed_mask
from hf_paged.models import forward_context
from hf_paged.reasons import Reason


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Make the mask of a "paged" model: `AttentionMaskInterface` calls it with the arguments of `sdpa_mask`.

    Returns
    -------
    torch.Tensor or None
        ``[batch, 1, queries, positions]``. A `PagedMask` if it is for a paged cache, and then the cache's padding is
        brought up to date. In every other case the mask the model would get without us: sdpa's, or eager's additive
        one for a model that knows no other.

    Raises
    ------
    UnsupportedError
        If `attention_mask` shows padding of an earlier forward.
    NotPackableError
        If a packed step asks for more than causal attention.
    """
    device = torch.device(device)
    if kv_offset == PACKED_OFFSET:
        return _mask_of_a_packed_step(mask_function, attention_mask, device)
    call = forward_context.current_forward()
    is_fused = call is None or call.supports_sdpa
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "dtype": dtype,
        "device": device,
        **kwargs,
    }
    make = functools.partial(_make_mask, sdpa_mask if is_fused else eager_mask, arguments)
    may_skip = q_length == 1 or not _may_drop_queries(kwargs.get("config"), q_length == kv_length)
    if torch.compiler.is_compiling():
        return make(may_skip)
    request = forward_context.take_mask_request((q_length, kv_length, kv_offset))
    if attention_mask is not None and (attention_mask.dim() != 2 or len(attention_mask) != batch_size):
        made = make(may_skip)  # Raises what sdpa's mask function raises, where it does.
        if request is None:
            return made
        # It takes more rows than the batch has, and any number of them if nothing is padding.
        attention_mask = None if made is None else attention_mask[:batch_size]
        arguments["attention_mask"] = attention_mask
    shape, dtype = (batch_size, 1, q_length, kv_length), torch.bool if is_fused else dtype
    if request is None:
        lens = _visible_lens(mask_function, attention_mask, kv_length)
        if lens is None:
            return make(may_skip)
        return PagedMask(shape, dtype, device, make, None, Reason.NOT_CAUSAL, kv_offset, lens)
    batch, layer = request
    if q_offset != batch.length(layer):
        return make(may_skip)
    obstacle = batch.padding.record(attention_mask, kv_offset, q_offset, q_offset + q_length)
    if batch.is_deferring:
        return make(may_skip)
    pattern = causal_pattern(mask_function)
    if pattern is not None and pattern.window is not None and not batch.padding.is_left:
        obstacle = obstacle or Reason.PADDED_WINDOW
    return PagedMask(shape, dtype, device, make, pattern, obstacle, kv_offset)


def _mask_of_a_packed_step(
    mask_function: Callable, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    if torch.compiler.is_compiling():
        # Dynamo cannot look into a function that was made while it traces. The engine did, uncompiled, at first.
        return packed_mask(None, device)
    pattern = causal_pattern(mask_function)
    if pattern is None or attention_mask is not None:
        raise NotPackableError(Reason.NOT_CAUSAL)
    return packed_mask(pattern.window, device)


def _make_mask(function: Callable, arguments: dict, may_skip: bool) -> torch.Tensor | None:
    """The mask that transformers' `function` makes; None only if `may_skip` and sdpa needs none."""
    skips = {name: arguments[name] and may_skip for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip")}
    return function(**{**arguments, **skips})


def _visible_lens(mask_function: Callable, columns: torch.Tensor | None, positions: int) -> list[int] | None:
    """For each row, the tokens from the front that all its queries see; None if that is not all there is to the mask.

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


def _may_drop_queries(config: PreTrainedConfig | None, is_square: bool) -> bool:
    """Tell whether the model may attend with its last queries only: without a mask they would count from the first key.

    gemma4 does, where an implementation is not named "sdpa": its last layers attend to the keys of others, so they
    compute only the positions whose logits are wanted. One query sees all keys of a mask that `is_square`.
    """
    call = None if torch.compiler.is_compiling() else forward_context.current_forward()
    if call is None:  # `generate` makes masks for static caches before the forward; Dynamo sees no calls.
        return bool(getattr(config, "num_kv_shared_layers", 0))
    kept = forward_context.argument("logits_to_keep")
    if not isinstance(kept, int) or kept <= 0 or (kept == 1 and is_square):
        return False
    kinds: set[type] = {type(module) for module in call.model.modules()}
    return any(_is_told_what_to_keep(kind) for kind in kinds)


@functools.cache
def _is_told_what_to_keep(kind: type) -> bool:
    """Tell whether a module without an LM head is told which logits are wanted; few are."""
    if not issubclass(kind, PreTrainedModel) or issubclass(kind, GenerationMixin):
        return False
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def causal_pattern(mask_function: Callable) -> MaskPattern | None:
    """Recognise a causal mask, with or without a sliding window; None for anything else.

    The mask function is all that a model says about its attention pattern, so it is read rather than
    trusted: transformers' own closures are known by name, and one unknown part makes the whole unknown.
    """
    if mask_function is causal_mask_function:
        return MaskPattern(None)
    functions = intersected_masks(mask_function)
    if functions is not None:
        parts = [causal_pattern(function) or _window_pattern(function) for function in functions]
        if None in parts or causal_mask_function not in functions:
            return None
        windows = [part.window for part in parts if part is not None and part.window is not None]
        return MaskPattern(min(windows, default=None))
    return None


def _window_pattern(mask_function: Callable) -> MaskPattern | None:
    window = sliding_window_of(mask_function)
    return None if window is None else MaskPattern(window)
