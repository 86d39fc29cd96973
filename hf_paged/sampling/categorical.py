"""Argmax and sampling over the vocabulary.

On a CPU they have two levels, first a part of the vocabulary, then a token of that part: torch's ``argmax`` and
``cumsum`` over a long last dimension take several times as long as maxima and sums of short parts do. On other devices
what counts is the number of operators, and that none of them waits for the device.
"""

import torch
from torch.nn import functional

from hf_paged.sampling.next_tokens import NextTokens

_PART_SIZES = (256, 128, 64)  # Tokens of a part: the first that divides the vocabulary.


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return ``scores.argmax(-1)``, the first of equal ones.

    Parameters
    ----------
    scores : torch.Tensor
        ``[rows, vocab]``

    Returns
    -------
    torch.Tensor
        ``[rows]`` int64
    """
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    parts = _in_parts(scores, float("-inf"))
    part = parts.amax(-1).argmax(-1, keepdim=True)  # [rows, 1]
    return (part * parts.shape[2] + _part_of(parts, part).argmax(-1, keepdim=True)).squeeze(1)


def sample(probabilities: torch.Tensor) -> NextTokens:
    """Sample one token a row. A token without probability is never sampled.

    Takes one of torch's random numbers a row on a CPU, one a token of the vocabulary on other devices.

    Parameters
    ----------
    probabilities : torch.Tensor
        ``[rows, vocab]``; a row need not add up to one. A row that is no distribution is told of by the result.
    """
    if probabilities.device.type != "cpu":
        return sample_with(probabilities, torch.empty_like(probabilities).exponential_(1))
    parts = _in_parts(probabilities, 0.0)
    sums = parts.sum(-1, dtype=torch.float64).cumsum(-1)  # [rows, parts]
    totals = sums[:, -1:]  # [rows, 1]
    is_valid = (totals > 0) & (totals < float("inf"))  # [rows, 1]; a NaN is neither.
    number = torch.rand(totals.shape, dtype=torch.float64) * totals  # [rows, 1]
    part = _first_above(sums, number)
    before = functional.pad(sums, (1, 0)).gather(1, part)
    within = _first_above(_part_of(parts, part).double().cumsum(-1), number - before)
    tokens = part * parts.shape[2] + within  # [rows, 1]
    return NextTokens(tokens.clamp_(max=probabilities.shape[1] - 1).squeeze(1), is_valid.squeeze(1))


def sample_with(probabilities: torch.Tensor, noise: torch.Tensor) -> NextTokens:
    """Sample one token a row with given random numbers, as ``torch.multinomial`` does with those that it draws.

    Parameters
    ----------
    probabilities : torch.Tensor
        ``[rows, vocab]``, the result of a softmax: a row is a distribution, or all NaN. Overwritten.
    noise : torch.Tensor
        ``[rows, vocab]``, exponential with mean 1, and of the same dtype.
    """
    ratios = probabilities.div_(noise)
    tokens = argmax(ratios)  # [rows]; a NaN counts as the largest.
    return NextTokens(tokens, ratios.gather(1, tokens[:, None]).squeeze(1) > 0)


def _in_parts(values: torch.Tensor, fill: float) -> torch.Tensor:
    """View ``[rows, vocab]`` as ``[rows, parts, tokens]``, filled up where the vocabulary ends."""
    vocab = values.shape[1]
    size = next((size for size in _PART_SIZES if vocab % size == 0), _PART_SIZES[0])
    if vocab % size:  # Even a padding of nothing is a copy.
        values = functional.pad(values, (0, -vocab % size), value=fill)
    return values.reshape(len(values), -1, size)


def _part_of(parts: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Take one part of each row: ``[rows, tokens]`` of ``[rows, parts, tokens]``, as ``[rows, 1]`` says."""
    return parts.gather(1, part[:, :, None].expand(-1, -1, parts.shape[2])).squeeze(1)


def _first_above(sums: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Find where running sums first exceed a number of their row.

    By rounding the number may be the last sum itself, which nothing exceeds: then it counts as a little less. Of what
    is no number, and never exceeded, the place is the last.

    Parameters
    ----------
    sums : torch.Tensor
        ``[rows, sums]``
    number : torch.Tensor
        ``[rows, 1]``

    Returns
    -------
    torch.Tensor
        ``[rows, 1]`` int64
    """
    last = sums[:, -1:]
    least = number.minimum(torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(sums, least, right=True).clamp_(max=sums.shape[1] - 1)
