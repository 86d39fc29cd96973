"""RowPicker: some rows of tensors that lie on one device."""

import functools
import itertools
from collections.abc import Sequence

import torch


class RowPicker:
    """Takes rows of tensors. Row numbers go to the device once, while the same rows are asked for.

    Parameters
    ----------
    device : torch.device
        Of the tensors.
    """

    def __init__(self, device: torch.device):
        self._index = functools.lru_cache(maxsize=32)(functools.partial(torch.tensor, device=device))

    def take(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return some rows, at least one: a view if they follow each other, else a copy.

        Parameters
        ----------
        values : torch.Tensor
            ``[all rows, ...]``
        rows : sequence of int

        Returns
        -------
        torch.Tensor
            ``[len(rows), ...]``
        """
        first, end = rows[0], rows[0] + len(rows)
        return values[first:end] if _follow_each_other(rows) else values.index_select(0, self._index(tuple(rows)))

    def copy(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return a copy of what `take` returns."""
        taken = self.take(values, rows)
        return taken.clone() if _follow_each_other(rows) else taken


def _follow_each_other(rows: Sequence[int]) -> bool:
    return all(row == first + 1 for first, row in itertools.pairwise(rows))
