"""Rows of a prompt batch that are the same: their keys and values are stored once."""

from typing import Any

import torch
from transformers import Cache


def same_rows(inputs: dict[Any, Any], batch_size: int) -> list[int] | None:
    """For each row of a model's inputs the first row that equals it in all of them.

    ``num_return_sequences`` and beam search expand every prompt before the prefill; the copies' states
    are equal, so their blocks can be shared until they diverge.

    Parameters
    ----------
    inputs : dict
        Arguments of the decoder's forward.
    batch_size : int

    Returns
    -------
    list of int or None
        None if no two rows are the same, or if the inputs hold something that cannot be compared.
    """
    tensors = []
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and len(value) in (batch_size, 1) and (value.ndim < 3 or value.is_floating_point()):
            tensors.append(value)
        elif value is not None and not isinstance(value, (bool, int, float, str, Cache)):
            return None
    ids = inputs.get("input_ids", inputs.get(0))
    if batch_size < 2 or not isinstance(ids, torch.Tensor) or ids.shape[0] != batch_size:
        return None
    first_of: dict[tuple, list[int]] = {}
    twins = list(range(batch_size))
    for row, tokens in enumerate(ids.tolist()):
        candidates = first_of.setdefault(tuple(tokens), [])
        twins[row] = next((other for other in candidates if _equal(tensors, row, other)), row)
        if twins[row] == row:
            candidates.append(row)
    return twins if twins != list(range(batch_size)) else None


def _equal(tensors: list[torch.Tensor], row: int, other: int) -> bool:
    return all(len(tensor) == 1 or torch.equal(tensor[row], tensor[other]) for tensor in tensors)
