"""NextTokens: the tokens that rows go on with, on their device until all of a step are read at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Read = list[int] | RuntimeError


@dataclass(frozen=True)
class NextTokens:
    """The next token of each of some rows.

    Attributes
    ----------
    ids : torch.Tensor
        ``[rows]`` int64, all of them in the vocabulary.
    is_valid : torch.Tensor or None
        ``[rows]`` bool: False where the scores were no distribution to sample from. None: no token was sampled.
    """

    ids: torch.Tensor
    is_valid: torch.Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list["NextTokens"]:
        """Part them among several calls, by their numbers of rows."""
        parts = self.ids.split(sizes)
        if self.is_valid is None:
            return [NextTokens(part) for part in parts]
        return [NextTokens(part, is_valid) for part, is_valid in zip(parts, self.is_valid.split(sizes))]


def read(several: Sequence[NextTokens]) -> list[Read]:
    """Bring the tokens of several calls to the host, in one copy for each device. It waits for the devices.

    Returns
    -------
    list of (list of int or RuntimeError)
        The tokens of each call, or the error of a call that has a row without a distribution.
    """
    found: list[Read] = [[]] * len(several)
    places: dict[torch.device, list[int]] = {}
    for place, one in enumerate(several):
        places.setdefault(one.ids.device, []).append(place)
    for some in places.values():
        marked = [_marked(several[place]) for place in some]
        numbers = (torch.cat(marked) if len(marked) > 1 else marked[0]).tolist()
        end = 0
        for place, part in zip(some, marked):
            begin, end = end, end + len(part)
            found[place] = _checked(numbers[begin:end])
    return found


def _marked(tokens: NextTokens) -> torch.Tensor:
    """Tokens ``[rows]``, -1 where the scores were no distribution: a number and its check are one copy."""
    return tokens.ids if tokens.is_valid is None else torch.where(tokens.is_valid, tokens.ids, -1)


def _checked(numbers: list[int]) -> Read:
    if -1 not in numbers:
        return numbers
    return RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # Dense says it so.
