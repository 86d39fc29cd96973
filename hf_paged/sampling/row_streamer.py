"""RowStreamer: a streamer of several rows, told by the packed loop and by transformers' own which row is which."""

import functools
from collections import deque
from collections.abc import Sequence

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """Base of streamers whose rows end at different times. Serves one call of `generate`.

    Subclasses say what happens in `begin`, `put_rows` and `end_rows`. These run in the thread of any call on the
    model's engine, once a token: they must not wait for anything.

    Attributes
    ----------
    is_closed : bool
        Whether nobody listens any more: the call ends within a step.
    gone : set of int
        Rows that nobody listens to: each ends at its next token, and its blocks are free.
    """

    def __init__(self):
        self.is_closed = False
        self.gone: set[int] = set()
        self._open: list[int] | None = None

    def begin(self, prompts: torch.Tensor) -> None:
        """Get the prompts, ``[rows, positions]`` int64 on the CPU, left-padded."""

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Get one new token for some of the rows."""
        raise NotImplementedError

    def end_rows(self, rows: Sequence[int]) -> None:
        """Learn that some rows have had their last token."""

    def fail(self, error: BaseException) -> None:
        """Learn that the call raises `error`."""

    def close(self) -> None:
        """Listen no more. The call returns with the tokens it has. May be called from any thread."""
        self.is_closed = True

    def is_gone(self, row: int) -> bool:
        """Whether nobody listens to the row."""
        return self.is_closed or row in self.gone

    def put(self, value: torch.Tensor) -> None:
        """What `generate` calls: with the prompts first, then (in assisted decoding) with tokens of a single row."""
        if self._open is None:
            self._open = list(range(len(value)))
            self.begin(value)
            return
        tokens = value.flatten().tolist()
        if len(self._open) == 1:
            for token in tokens:
                self.put_rows(self._open, [token])
        else:
            self.put_rows(self._open, tokens)

    def tell(self, rows: Sequence[int], tokens: Sequence[int], ended: Sequence[int]) -> None:
        """Hand on a step: new tokens of some rows, and which of them end with it."""
        self.put_rows(rows, tokens)
        if ended:
            self._open = [row for row in self._open if row not in ended]
            self.end_rows(ended)

    def end(self) -> None:
        """What `generate` calls when all rows are over."""
        self.end_rows(self._open)
        self._open = []


class _Watched(StoppingCriteriaList):
    """Criteria of transformers' loop that note which rows they end."""

    def __init__(self, criteria, streamer: RowStreamer):
        super().__init__(criteria)
        self._streamer, self._open = streamer, None
        self.steps: deque[tuple[list[int], list[int]]] = deque()  # (rows with a token, those that end with it)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        over = super().__call__(input_ids, scores, **kwargs)
        rows = list(range(len(over))) if self._open is None else self._open
        gone = torch.tensor([self._streamer.is_gone(row) for row in range(len(over))], device=over.device)
        over = over | gone
        ended = [row for row, is_over in enumerate(over.tolist()) if is_over and row in rows]
        self._open = [row for row in rows if row not in ended]
        self.steps.append((rows, ended))
        return over


class _ByRow(BaseStreamer):
    """Tells a `RowStreamer` what transformers' loop puts for the whole batch, pads of finished rows left out."""

    def __init__(self, streamer: RowStreamer, watched: _Watched):
        self._streamer, self._watched = streamer, watched

    def put(self, value: torch.Tensor) -> None:
        rows, ended = self._watched.steps.popleft()
        tokens = value.tolist()
        self._streamer.tell(rows, [tokens[row] for row in rows], ended)

    def end(self) -> None:
        self._streamer.end()


def by_rows(sample):
    """``GenerationMixin._sample``, able to tell a `RowStreamer` of rows."""

    @functools.wraps(sample)
    def sample_by_rows(model, *args, **kwargs):
        if isinstance(kwargs.get("streamer"), RowStreamer):
            watched = _Watched(kwargs["stopping_criteria"], kwargs["streamer"])
            kwargs.update(stopping_criteria=watched, streamer=_ByRow(kwargs["streamer"], watched))
        return sample(model, *args, **kwargs)

    return sample_by_rows
