"""Duplicate rows: rows of a prompt batch with the same input, whose keys and values are stored once."""

from collections.abc import Sequence

import torch

# Rows of one batched product may differ in float32's last bits; states that differ by more are different.
# Half precision gets no more room: its own last bits are as large as an adapter's effect.
_TOLERANCE = 64 * torch.finfo(torch.float32).eps


def first_equal_rows(input_ids: torch.Tensor, valid: torch.Tensor | None) -> list[int] | None:
    """For each row of a prompt batch, find the first row with the same tokens and padding.

    ``num_return_sequences`` and beam search expand every prompt before the prefill. Equal tokens are only
    a reason to look: rows may still differ in what the cache is not shown (images, adapters, an encoder),
    so `have_equal_states` has the last word, in every layer.

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
    duplicate_of = [first.setdefault(tuple(tokens), row) for row, tokens in enumerate(rows.tolist())]
    return duplicate_of if len(first) < len(duplicate_of) else None


def have_equal_states(duplicate_of: Sequence[int], states: torch.Tensor) -> bool:
    """Tell whether rows that are stored once have the same states.

    Parameters
    ----------
    duplicate_of : sequence of int
        As `first_equal_rows` returns it.
    states : torch.Tensor
        Keys or values, ``[batch, num_kv_heads, positions, head_dim]``.
    """
    for row, original in enumerate(duplicate_of):
        if row != original:
            difference = (states[row] - states[original]).abs().max()
            if not bool(difference <= _TOLERANCE * states[original].abs().max()):  # NaN differs, too.
                return False
    return True
