"""Padding: which positions of the dense rectangle hold tokens. Only those are stored."""

from collections.abc import Sequence

import torch

from hf_paged.errors import UnsupportedError
from hf_paged.reasons import Reason, Why


def is_binary(mask: torch.Tensor) -> bool:
    """Tell whether a mask holds 0 and 1 only: `generate` counts positions by adding its values up."""
    return bool(((mask == 0) | (mask == 1)).all())


class Padding:
    """The 2D attention mask of the positions a cache has seen.

    Positions past the recorded ones hold tokens, so a decode step has nothing to record.

    Attributes
    ----------
    valid : torch.Tensor or None
        ``[batch, positions]`` bool, False where a position is padding; None if no position is.
    is_left : bool
        Whether all padding comes before the tokens of its row. It keeps the distances between them; other padding
        does not.
    """

    def __init__(self, valid: torch.Tensor | None = None):
        self._set(valid)

    def _set(self, valid: torch.Tensor | None) -> None:
        self.valid = valid
        self._totals: list[int] = [] if valid is None else valid.sum(1).tolist()
        self.is_left = valid is None or not bool((valid[:, :-1] & ~valid[:, 1:]).any())

    def copy(self) -> "Padding":
        return Padding(self.valid)

    def record(self, mask: torch.Tensor | None, visible_from: int, start: int, end: int) -> Why | None:
        """Learn from a forward's 2D mask which of the positions ``start .. end - 1`` hold tokens.

        Parameters
        ----------
        mask : torch.Tensor or None
            ``[batch, positions]`` bool over all positions so far; missing columns are padding. None: no padding.
        visible_from : int
            First position that the forward can still see (0, or the start of the sliding window).
        start, end : int
            The positions of the forward.

        Returns
        -------
        Reason or None
            The obstacle to reading the pages: the mask hides tokens that are stored. None if it hides none.

        Raises
        ------
        UnsupportedError
            If the mask shows positions that were padding when they were seen: they were never stored.
        """
        if mask is not None and mask.shape[1] < end:
            mask = torch.nn.functional.pad(mask, (0, end - mask.shape[1]))
        if mask is not None and bool(mask[:, visible_from:end].all()):
            mask = None
        if self.valid is not None:
            recorded = self.valid
        elif mask is not None:
            recorded = torch.ones(len(mask), 0, dtype=torch.bool, device=mask.device)
        else:
            return None
        seen = _columns(recorded, visible_from, start)
        shown = torch.ones_like(seen) if mask is None else mask[:, visible_from:start]
        if bool((shown & ~seen).any()):
            raise UnsupportedError(
                "the attention_mask shows positions that were padding in an earlier call, and padding is never stored "
                'by attn_implementation="paged": pass the attention_mask of the whole sequence on every call'
            )
        if self.valid is not None and self.valid.shape[1] > start:
            self._set(self.valid[:, :start])
        if mask is not None and not bool(mask[:, start:end].all()):
            self._set(torch.cat([_columns(recorded, 0, start), mask[:, start:end]], dim=1))
        return Reason.HIDDEN_TOKENS if bool((seen & ~shown).any()) else None

    def tokens_before(self, position: int, batch_size: int) -> list[int]:
        """For each row, how many of the positions before `position` hold tokens."""
        if self.valid is None:
            return [position] * batch_size
        recorded = self.valid.shape[1]
        if position >= recorded:
            return [total + position - recorded for total in self._totals]
        return self.valid[:, :position].sum(1).tolist()

    def valid_in(self, start: int, end: int) -> torch.Tensor | None:
        """``[batch, end - start]`` bool, or None if all of these positions hold tokens."""
        if self.valid is None or start >= self.valid.shape[1]:
            return None
        columns = _columns(self.valid, start, end)
        return None if bool(columns.all()) else columns

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if self.valid is not None and self.valid.shape[1] > length:
            self._set(self.valid[:, :length] if length else None)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row ``i`` what row ``rows[i]`` is now."""
        if self.valid is not None:
            self._set(self.valid[torch.tensor(rows, dtype=torch.long, device=self.valid.device)])


def _columns(valid: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """``[batch, end - start]`` bool: the recorded bits of some positions, True past the recorded ones."""
    columns = valid[:, start:end]
    return torch.nn.functional.pad(columns, (0, end - start - columns.shape[1]), value=True)
