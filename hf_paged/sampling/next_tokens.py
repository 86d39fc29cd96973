"""NextTokens: the tokens that rows go on with, on their device until all of a step are read at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_TOKEN = -1  # In place of the token of a row whose scores were no distribution to sample from.


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

    def of(self, places: Sequence[int]) -> "NextTokens":
        """The tokens of some of the rows."""
        some = torch.tensor(places, device=self.ids.device)
        return NextTokens(self.ids[some], None if self.is_valid is None else self.is_valid[some])

    @classmethod
    def joined(cls, several: Sequence["NextTokens"], device: torch.device) -> "NextTokens":
        """Join the tokens of several calls, on one device."""
        ids = [one.ids.to(device) for one in several]
        if all(one.is_valid is None for one in several):
            return cls(torch.cat(ids) if len(ids) > 1 else ids[0])
        valid = [
            torch.ones_like(one.ids, dtype=torch.bool) if one.is_valid is None else one.is_valid for one in several
        ]
        return cls(torch.cat(ids), torch.cat([part.to(device) for part in valid]))

    def marked(self) -> torch.Tensor:
        """Return the tokens ``[rows]``, `NO_TOKEN` where a row had no distribution: both are one copy."""
        return self.ids if self.is_valid is None else torch.where(self.is_valid, self.ids, NO_TOKEN)


def read(several: Sequence[NextTokens]) -> list[list[int]]:
    """Bring the tokens of several calls to the host, in one copy for each device. It waits for the devices.

    Returns
    -------
    list of list of int
        The tokens of each call, `NO_TOKEN` for a row without a distribution.
    """
    found: list[list[int]] = [[]] * len(several)
    places: dict[torch.device, list[int]] = {}
    for place, one in enumerate(several):
        places.setdefault(one.ids.device, []).append(place)
    for some in places.values():
        marked = [several[place].marked() for place in some]
        numbers = (torch.cat(marked) if len(marked) > 1 else marked[0]).tolist()
        end = 0
        for place, part in zip(some, marked):
            begin, end = end, end + len(part)
            found[place] = numbers[begin:end]
    return found


def check(numbers: Sequence[int]) -> None:
    """Raise dense's error if some row had no distribution to sample from.

    Raises
    ------
    RuntimeError
        If a `NO_TOKEN` is among the tokens.
    """
    if NO_TOKEN in numbers:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
