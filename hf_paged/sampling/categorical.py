"""Choosing from the vocabulary in two levels: a part of it, then a token of that part.

On a CPU torch's ``argmax`` and ``cumsum`` over a long last dimension take several times as long as maxima and sums of
short parts do.
"""

import torch
from torch.nn import functional

_PARTS = (256, 128, 64)  # Tokens of a part: the first that divides the vocabulary.


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """``scores.argmax(-1)``: of equal ones the first, ``[rows]`` int64 from ``[rows, vocab]``."""
    parts = _in_parts(scores, float("-inf"))
    part = parts.amax(-1).argmax(-1, keepdim=True)
    return (part * parts.shape[2] + _part_of(parts, part).argmax(-1, keepdim=True)).squeeze(1)


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """Draw one token a row, each as often as its share says, ``[rows]`` int64 from ``[rows, vocab]``.

    Takes one of torch's random numbers a row. A token without probability is never drawn.

    Raises
    ------
    RuntimeError
        If a row is no distribution.
    """
    parts = _in_parts(probabilities, 0.0)
    sums = parts.sum(-1, dtype=torch.float64).cumsum(-1)  # [rows, parts]
    totals = sums[:, -1:]
    if not bool((totals.isfinite() & (totals > 0)).all()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    drawn = torch.rand(totals.shape, dtype=torch.float64, device=totals.device) * totals
    part = _first_above(sums, drawn)
    before = functional.pad(sums, (1, 0)).gather(1, part)
    within = _first_above(_part_of(parts, part).double().cumsum(-1), drawn - before)
    return (part * parts.shape[2] + within).squeeze(1)


def _in_parts(values: torch.Tensor, fill: float) -> torch.Tensor:
    """``[rows, vocab]`` as ``[rows, parts, tokens]``, filled up where the vocabulary ends."""
    vocab = values.shape[1]
    size = next((size for size in _PARTS if vocab % size == 0), _PARTS[0])
    if vocab % size:  # Even a padding of nothing is a copy.
        values = functional.pad(values, (0, -vocab % size), value=fill)
    return values.reshape(len(values), -1, size)


def _part_of(parts: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """One part of each row, ``[rows, tokens]``."""
    return parts.gather(1, part[:, :, None].expand(-1, -1, parts.shape[2])).squeeze(1)


def _first_above(sums: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Where running sums first exceed a number of their row, ``[rows, 1]``; it may be the last sum by rounding."""
    last = sums[:, -1:]
    return torch.searchsorted(sums, number.minimum(torch.nextafter(last, torch.zeros_like(last))), right=True)
