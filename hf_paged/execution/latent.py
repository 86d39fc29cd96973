"""Latents: how a layer of multi-head latent attention (MLA) attends while its pages hold no more than its latents.

Such a layer hands its cache a latent and a rope part for each token, one of each for all heads. Before it attends it
expands them: a linear layer, ``kv_b_proj``, makes of a latent one part of each head's key and its value; the rope part
is the rest of every key. For a whole context that would be as much work, and as much memory, as attention with as many
keys and values. Being linear, the expansion can change sides. The query, multiplied by the weights that make keys,
meets latents as they are; and of latents, weighted and summed, the weights that make values make the result. This is
absorbed attention (DeepSeek-V2, arXiv:2405.04434), and `hf_paged_kernels.ops.latent_attention` computes its middle.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from hf_paged.compat.torch import module_parts
from hf_paged.compat.transformers import is_hooked_by_accelerate
from hf_paged.execution.prepacked_linear import PrepackedForward
from hf_paged.reasons import Reason, Why

_FORWARD = torch.nn.Linear.forward


class Expansion(NamedTuple):
    """The weights that make keys and values of latents: views of the layer's own, good for one forward.

    Attributes
    ----------
    key_weight : torch.Tensor
        ``[num_heads, nope_dim, rank]``: makes the part of a key that is not its rope part, and stands before that.
    value_weight : torch.Tensor
        ``[num_heads, value_dim, rank]``
    """

    key_weight: torch.Tensor
    value_weight: torch.Tensor

    def absorb(
        self,
        query: torch.Tensor,  # [num_heads, num_tokens, nope_dim + rope_dim]
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_tokens, num_heads, rank], [num_tokens, num_heads, rope_dim]
        """Turn queries into those that meet latents and rope parts."""
        nope_dim = self.key_weight.shape[1]
        query_latent = torch.bmm(query[..., :nope_dim], self.key_weight)
        return query_latent.transpose(0, 1), query[..., nope_dim:].transpose(0, 1)

    def values_of(
        self,
        summed: torch.Tensor,  # [num_tokens, num_heads, rank]
    ) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
        """Turn weighted sums of latents into those of values."""
        weight = self.value_weight
        if weight.device.type == "cpu" and weight.itemsize == 2:
            weight = weight.contiguous()  # Else torch copies it turned around, number by number.
        return torch.bmm(summed.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)

    def makes(
        self,
        latent: torch.Tensor,  # [1, 1, num_tokens, rank]
        rope: torch.Tensor,  # [1, 1, num_tokens, rope_dim]
        key: torch.Tensor,  # [1, num_heads, num_tokens, nope_dim + rope_dim]
        value: torch.Tensor,  # [1, num_heads, num_tokens, value_dim]
    ) -> bool:
        """Tell whether these keys and values are, up to rounding, what the weights make of latents and rope parts."""
        nope, expected_value = (
            functional.linear(latent[0], weight.flatten(0, 1)).unflatten(2, weight.shape[:2]).movedim(2, 1)
            for weight in self
        )  # [1, num_heads, num_tokens, dim]
        expected_key = torch.cat((nope, rope.expand(-1, len(self.key_weight), -1, -1)), 3)
        return _is_close(key, expected_key) and _is_close(value, expected_value)


def find_expansion(
    module: torch.nn.Module,
    latent: torch.Tensor,  # [1, num_kv_heads, num_tokens, rank]
    rope: torch.Tensor,  # [1, num_kv_heads, num_tokens, rope_dim]
    key: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
    value: torch.Tensor,  # [1, num_heads, num_tokens, value_dim]
    is_trial: bool,
) -> Expansion | Why:
    """The weights by which an attention layer has expanded what its cache was given, or why they cannot be absorbed.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    latent, rope : torch.Tensor
        The states of the new tokens that the cache was given, as keys and as values.
    key, value : torch.Tensor
        What the layer made of them, and attends to.
    is_trial : bool
        True: compare numbers, too. A model is tried anew when its structure changes; weights may change at any
        time, and are the layer's own at each step.
    """
    projection = getattr(module, "kv_b_proj", None)
    if projection is None or latent.shape[1] != 1 or key.shape[3] <= rope.shape[3]:
        return Reason.EARLY_COMPUTATION
    # What is traced was tried before, and looking into hooks would end the trace.
    obstacle = None if torch.compiler.is_compiling() else _obstacle(projection, latent)
    if obstacle is not None:
        return Reason.UNABSORBED.of(obstacle)
    num_heads, value_dim, nope_dim = key.shape[1], value.shape[3], key.shape[3] - rope.shape[3]
    weight, rank = projection.weight, latent.shape[3]
    if weight.shape != (num_heads * (nope_dim + value_dim), rank):
        return Reason.UNABSORBED.of(f"its weight is {list(weight.shape)}")
    expansion = Expansion(*weight.view(num_heads, -1, rank).split((nope_dim, value_dim), 1))
    if is_trial and not expansion.makes(latent, rope, key, value):
        return Reason.UNABSORBED.of("it makes other keys and values")
    return expansion


def _obstacle(projection: torch.nn.Module, latent: torch.Tensor) -> str | None:
    """The reason why a layer may compute something else than a product with its weight; None if it does not."""
    if not isinstance(projection, torch.nn.Linear) or type(projection).forward is not _FORWARD:
        return f"it is a {type(projection).__name__}"
    weight = projection.weight
    if type(weight) is not torch.nn.Parameter:  # Quantised, sharded or parametrised.
        return f"its weight is a {type(weight).__name__}"
    if projection.bias is not None:
        return "it has a bias"
    if weight.dtype != latent.dtype or weight.device != latent.device:
        return f"its weight is in {weight.dtype} on {weight.device}"
    _, _, _, hooks, pre_hooks = module_parts(vars(projection))
    own = vars(projection).get("forward")
    is_own = isinstance(own, PrepackedForward | None) or is_hooked_by_accelerate(projection)
    return None if is_own and not hooks and not pre_hooks else "its forward is hooked"


def _is_close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two tensors differ by no more than the rounding of their products."""
    if got.shape != expected.shape:
        return False
    tolerance = torch.finfo(got.dtype).eps ** 0.5
    return bool(((got - expected).abs().max() <= tolerance * expected.abs().max()).item())
