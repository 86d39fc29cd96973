"""CallTokens: what the rows of a call hold so far, as numbers or as the rectangle that dense ``generate`` works on."""

from collections.abc import Sequence

import torch

from hf_paged.sampling.row_picker import RowPicker

_MOST_ROOM = 1024


class CallTokens:
    """The prompts of a call's rows, and what was generated after them: ``[batch, positions + generated]``.

    Where processors or criteria look at tokens, they lie in a tensor from the start, on the device of the prompts. Else
    they are numbers on the host until the end, and nothing is written to the device for a token.

    Parameters
    ----------
    input_ids : torch.Tensor
        ``[batch, positions]`` int64
    pad : int
        Fills rows that have ended.
    room : int
        Tokens that a row may generate.
    are_read : bool
        Whether processors or criteria look at tokens.

    Attributes
    ----------
    counts : list of int
        Tokens generated, by row.
    """

    def __init__(self, input_ids: torch.Tensor, pad: int, room: int, are_read: bool):
        self.counts = [0] * len(input_ids)
        self._input_ids, self._pad, self._width = input_ids, pad, input_ids.shape[1]
        self._picker = RowPicker(input_ids.device)
        self._generated: list[list[int]] = [[] for _ in self.counts]
        self._ids: torch.Tensor | None = None
        if are_read:
            with torch.inference_mode(False):  # Another thread may write to it.
                self._ids = torch.cat([input_ids, self._pads(max(64, min(_MOST_ROOM, room)))], dim=1)

    @property
    def ids(self) -> torch.Tensor:
        """The tensor, ``[batch, columns]``, columns that no row has reached included. It may be written to."""
        assert self._ids is not None, "the tokens of a call whose tokens are read"
        return self._ids

    def append(self, rows: Sequence[int], tokens: torch.Tensor, numbers: Sequence[int]) -> None:
        """Note the next token of some rows.

        Parameters
        ----------
        tokens : torch.Tensor
            ``[len(rows)]`` int64, on the device of the prompts.
        numbers : sequence of int
            The same tokens.
        """
        if self._ids is None:
            for row, number in zip(rows, numbers):
                self._generated[row].append(number)
        else:
            self._write(rows, tokens)
        for row in rows:
            self.counts[row] += 1

    def _write(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        at = [self._width + self.counts[row] for row in rows]
        if max(at) >= self.ids.shape[1]:
            self._ids = torch.cat([self.ids, self._pads(self.ids.shape[1])], dim=1)
        ids = self.ids
        if len(rows) == len(ids) and min(at) == max(at):
            ids[:, at[0]] = tokens
        else:
            places = [row * ids.shape[1] + column for row, column in zip(rows, at)]
            ids.view(-1).index_copy_(0, torch.tensor(places, device=ids.device), tokens)

    def of_rows(self, rows: Sequence[int], count: int) -> torch.Tensor:
        """Copy what some rows hold, with `count` generated tokens: ``[len(rows), positions + count]``."""
        return self._picker.copy(self.ids[:, : self._width + count], rows)

    def rectangle(self, count: int) -> torch.Tensor:
        """Copy what all rows hold, filled up to `count` generated tokens: ``[batch, positions + count]``."""
        if self._ids is not None:
            return self._ids[:, : self._width + count].clone()
        filled = [tokens + [self._pad] * (count - len(tokens)) for tokens in self._generated]
        new = torch.tensor(filled, dtype=torch.long, device=self._input_ids.device)
        return torch.cat([self._input_ids, new], dim=1)

    def _pads(self, count: int) -> torch.Tensor:
        return self._input_ids.new_full((len(self._input_ids), count), self._pad)
