"""Rows of a prompt batch that are the same: their keys and values are stored once."""

from collections.abc import Sequence

import torch

# Rows of one batched product may differ in float32's last bits; states that differ by more are different.
# Half precision gets no more room: its own last bits are as large as an adapter's effect.
_TOLERANCE = 64 * torch.finfo(torch.float32).eps


def same_rows(input_ids: torch.Tensor, valid: torch.Tensor | None) -> list[int] | None:
    """For each row of a prompt batch the first row with the same tokens and padding.

    ``num_return_sequences`` and beam search expand every prompt before the prefill. Equal tokens are only
    a reason to look: rows may still differ in what the cache is not shown (images, adapters, an encoder),
    so `agree` has the last word, in every layer.

    Parameters
    ----------
    input_ids : torch.Tensor
        ``[batch, positions]``: tokens, or any sign by which positions with other states differ.
    valid : torch.Tensor or None
        ``[batch, positions]`` bool, False at padding.

    Returns
    -------
    list of int or None
        None if all rows differ.
    """
    rows = input_ids if valid is None else torch.cat([input_ids, valid.to(input_ids)], dim=1)
    first: dict[tuple, int] = {}
    twins = [first.setdefault(tuple(tokens), row) for row, tokens in enumerate(rows.tolist())]
    return twins if len(first) < len(twins) else None


def agree(twins: Sequence[int], states: torch.Tensor) -> bool:
    """Whether rows that are stored once have the same states ``[batch, num_kv_heads, positions, head_dim]``."""
    for row, twin in enumerate(twins):
        if row != twin:
            if not bool((states[row] - states[twin]).abs().max() <= _TOLERANCE * states[twin].abs().max()):
                return False
    return True
