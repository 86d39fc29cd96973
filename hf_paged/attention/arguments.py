"""The arguments of the "paged" attention function: what models hand to it, and which of them it knows."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import TransformersKwargs

from hf_paged.compat.transformers import output_collector
from hf_paged.errors import UnsupportedError
from hf_paged.execution.packed_cache import PACKED_FORWARD
from hf_paged.models import forward_context

# Every argument that a model of transformers 5.23 hands to its attention function and that our attention, or the sdpa
# and eager functions it calls, takes into account or may ignore as those do.
_KNOWN = {
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


@dataclass
class AttentionCall:
    """One call of the attention function, outside packed steps.

    Attributes
    ----------
    module : torch.nn.Module
        The attention layer that calls.
    query : torch.Tensor
        ``[batch, num_heads, queries, key_dim]``
    key, value : torch.Tensor
        ``[batch, num_kv_heads, positions, head_dim]``, dense or lazy; the head sizes may differ.
    mask : torch.Tensor or None
        ``[batch, 1, queries, positions]``: True where a query sees a position, or added to the scores; may be lazy.
        None is what sdpa takes it for: causal, or no mask at all.
    dropout : float
        Probability.
    scaling : float or None
        Factor of the scores; None: ``key_dim ** -0.5``.
    options : dict
        Every other keyword.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    scaling: float | None
    options: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """Tell how sdpa reads a mask that is None."""
        told = self.options.get("is_causal")
        return getattr(self.module, "is_causal", True) if told is None else told

    @property
    def sinks(self) -> torch.Tensor | None:
        """``[num_heads]``, one more score per head that takes its share of the softmax and has no value."""
        sinks = self.options.get("s_aux")
        return self.options.get("sinks") if sinks is None else sinks


def check_arguments(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuse a keyword that we would ignore although the model gives it a meaning.

    Raises
    ------
    UnsupportedError
        If `module` passes one.
    """
    unknown = [name for name in options if name not in _KNOWN and name not in _MODEL_FLAGS]
    unknown = [name for name in unknown if options[name] is not None and _is_the_models_own(type(module), name)]
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention function, which "
            'attn_implementation="paged" does not know and will not ignore: load the model with "sdpa" or "eager"'
        )


def wants_weights(options: dict[str, Any]) -> bool:
    """Tell whether the caller asked for attention weights; not every model passes the argument down."""
    return bool(options.get("output_attentions")) or "attentions" in (output_collector.get() or ())


def _is_the_models_own(kind: type, name: str) -> bool:
    """Tell whether the model itself passes the keyword: the caller's keywords travel beside it and mean nothing.

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
