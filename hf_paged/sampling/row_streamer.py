"""RowStreamer: a streamer of several rows, served by packed steps and by transformers' own loop."""

import functools
from collections import deque
from collections.abc import Callable, Sequence

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """Base of streamers whose rows end at different times. Serves one call of ``generate``.

    A subclass gets tokens by `begin`, `put_rows` and `end_rows`. These run in the thread of any call on the model's
    engine, once a token: they must not wait for anything.

    Attributes
    ----------
    is_closed : bool
        The consumer takes no more tokens: the call ends within a step.
    gone : set of int
        Rows whose consumers take no more tokens: each ends at its next token, and its blocks are free.
    """

    def __init__(self):
        self.is_closed = False
        self.gone: set[int] = set()
        self._has_begun = False
        self._open: list[int] = []  # Rows that have not ended.

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
        """Take no more tokens. The call returns with those it has. May be called from any thread."""
        self.is_closed = True

    def is_gone(self, row: int) -> bool:
        """Tell whether the row's consumer takes no more tokens."""
        return self.is_closed or row in self.gone

    def put(self, value: torch.Tensor) -> None:
        """Take what ``generate`` streams: the prompts, then (in assisted decoding) tokens of a single row.

        Parameters
        ----------
        value : torch.Tensor
            ``[rows, positions]`` at first, then ``[tokens]``.
        """
        if not self._has_begun:
            self._has_begun, self._open = True, list(range(len(value)))
            self.begin(value)
            return
        tokens = value.flatten().tolist()
        if len(self._open) == 1:
            for token in tokens:
                self.put_rows(self._open, [token])
        else:
            self.put_rows(self._open, tokens)

    def tell(self, rows: Sequence[int], tokens: Sequence[int], ended: Sequence[int]) -> None:
        """Take a step: a new token for each of some rows, and those of them that end with it."""
        self.put_rows(rows, tokens)
        if ended:
            self._open = [row for row in self._open if row not in ended]
            self.end_rows(ended)

    def end(self) -> None:
        """End the rows that are left. ``generate`` calls it last."""
        self.end_rows(self._open)
        self._open = []


class _WatchedCriteria(StoppingCriteriaList):
    """Criteria of transformers' loop that note which rows they end."""

    def __init__(self, criteria, streamer: RowStreamer):
        super().__init__(criteria)
        self._streamer = streamer
        self._open: list[int] | None = None  # Rows that have not ended; None: the first step has not come.
        self.steps: deque[tuple[list[int], list[int]]] = deque()  # (rows with a token, those that end with it)

    def __call__(self, input_ids, scores, **kwargs):
        over = super().__call__(input_ids, scores, **kwargs)  # [rows]
        rows = list(range(len(over))) if self._open is None else self._open
        gone = torch.tensor([self._streamer.is_gone(row) for row in range(len(over))], device=over.device)
        over = over | gone
        ended = [row for row, is_over in enumerate(over.tolist()) if is_over and row in rows]
        self._open = [row for row in rows if row not in ended]
        self.steps.append((rows, ended))
        return over


class _BatchStreamer(BaseStreamer):
    """Hands a `RowStreamer` what transformers' loop puts for the whole batch, without the pads of finished rows."""

    def __init__(self, streamer: RowStreamer, criteria: _WatchedCriteria):
        self._streamer, self._criteria = streamer, criteria

    def put(self, value: torch.Tensor) -> None:
        rows, ended = self._criteria.steps.popleft()
        tokens = value.tolist()
        self._streamer.tell(rows, [tokens[row] for row in rows], ended)

    def end(self) -> None:
        self._streamer.end()


def by_rows(sample: Callable) -> Callable:
    """Let ``GenerationMixin._sample`` serve a `RowStreamer`, too."""

    @functools.wraps(sample)
    def sample_by_rows(model, *args, **kwargs):
        if isinstance(kwargs.get("streamer"), RowStreamer):
            criteria = _WatchedCriteria(kwargs["stopping_criteria"], kwargs["streamer"])
            kwargs.update(stopping_criteria=criteria, streamer=_BatchStreamer(kwargs["streamer"], criteria))
        return sample(model, *args, **kwargs)

    return sample_by_rows
