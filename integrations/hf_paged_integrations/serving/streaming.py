"""BatchTextIteratorStreamer: the text of several rows, each row's as it comes.

transformers' own streamers work unchanged for one row. None of them can tell that its consumer has gone away: the call
runs to its end. Close the streamer of this module, or drop what iterates over it, and the blocks are free.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from hf_paged.sampling.row_streamer import RowStreamer

_Event = tuple[int, int | None]  # (row, its next token), or (row, None) when the row is over.


class BatchTextIteratorStreamer(RowStreamer):
    """Streams the text of every row of one ``generate`` call, in the pieces that `TextIteratorStreamer` gives.

    Run ``generate`` in a thread, and iterate over the streamer for ``(row, text)``, or over ``row(number)``, in others.
    An iterator that is closed or dropped ends its rows (once it has begun); so does `close`. An error that ``generate``
    raises in its loop is raised here too; one that it raises before, for bad arguments, is not seen here: give a
    `timeout` if that can happen.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    skip_prompt : bool
        Leave the prompts out.
    timeout : float or None
        Seconds to wait for a token before ``TimeoutError``. None: for ever.
    **decode_kwargs
        As for ``tokenizer.decode``.

    Examples
    --------
    >>> with BatchTextIteratorStreamer(tokenizer, skip_prompt=True) as streamer:  # doctest: +SKIP
    ...     threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
    ...     for row, text in streamer:
    ...         print(row, text)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs,
    ):
        super().__init__()
        self._tokenizer, self._skip_prompt, self._decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self._timeout, self._wakeup = timeout, threading.Condition()
        self._prompts: torch.Tensor | None = None  # [rows, positions]; None: the call has not begun.
        self._events: list[_Event] = []  # In order of arrival, kept for iterators that begin later.
        self._error: BaseException | None = None

    def begin(self, prompts: torch.Tensor) -> None:
        with self._wakeup:
            self._prompts = prompts
            self._wakeup.notify_all()

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._add(zip(rows, tokens))

    def end_rows(self, rows: Sequence[int]) -> None:
        self._add((row, None) for row in rows)

    def fail(self, error: BaseException) -> None:
        with self._wakeup:
            self._error = self._error or error
            self._wakeup.notify_all()

    def close(self) -> None:
        super().close()
        self._add(())

    def _add(self, events: Iterable[_Event]) -> None:
        with self._wakeup:
            self._events.extend(events)
            self._wakeup.notify_all()

    def __enter__(self) -> "BatchTextIteratorStreamer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Iterate over ``(row, text)`` of all rows."""
        try:
            yield from self._texts(None)
        finally:
            self.close()

    def row(self, number: int) -> Iterator[str]:
        """Iterate over the text of one row."""
        try:
            for _, text in self._texts(number):
                yield text
        finally:
            self.gone.add(number)

    def _texts(self, wanted: int | None) -> Iterator[tuple[int, str]]:
        """Iterate over ``(row, text)`` of one row, or of all, until they are over or the streamer is closed."""
        prompts = self._wait_for_prompts()
        if prompts is None:
            return
        rows: dict[int, _RowText] = {}
        for row in range(len(prompts)) if wanted is None else [wanted]:
            rows[row] = _RowText(self._tokenizer, self._skip_prompt, **self._decode_kwargs)
        for row, text in rows.items():
            yield from ((row, piece) for piece in text.put_all(prompts[row]))
        seen = 0
        while rows:
            events = self._wait_for_events(seen)
            if events is None:
                return
            seen += len(events)
            for row, token in events:
                if row in rows:
                    pieces = rows.pop(row).end_all() if token is None else rows[row].put_all(torch.tensor([token]))
                    yield from ((row, piece) for piece in pieces)

    def _wait_for_prompts(self) -> torch.Tensor | None:
        """Wait for the call to begin; None if the streamer was closed before that."""
        with self._wakeup:
            while self._prompts is None:
                if not self._wait():
                    return None
            return self._prompts

    def _wait_for_events(self, seen: int) -> list[_Event] | None:
        """Wait for more events than were seen; None if the streamer was closed and none will come."""
        with self._wakeup:
            while len(self._events) == seen:
                if not self._wait():
                    return None
            return self._events[seen:]

    def _wait(self) -> bool:
        """Wait for a change, with `_wakeup` held; False if the streamer is closed. Raises the error of the call."""
        if self._error is not None:
            raise self._error.with_traceback(None)  # The frames in the traceback hold the call's cache.
        if self.is_closed:
            return False
        if not self._wakeup.wait(self._timeout):
            raise TimeoutError(f"no token came for {self._timeout} seconds: give the streamer a longer timeout")
        return True


class _RowText(TextStreamer):
    """Cuts one row's tokens into pieces of text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._pieces.append(text)

    def put_all(self, tokens: torch.Tensor) -> list[str]:
        """Return the text that is complete with these tokens, ``[tokens]`` int64."""
        self.put(tokens)
        return self._take()

    def end_all(self) -> list[str]:
        """Return the text that is left."""
        self.end()
        return self._take()

    def _take(self) -> list[str]:
        pieces, self._pieces = [piece for piece in self._pieces if piece], []
        return pieces
