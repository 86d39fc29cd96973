"""Streaming of several rows: each row's text as it comes.

transformers' own streamers work unchanged for one row. None of them can tell that its consumer has gone away:
the call runs to its end. Close the streamer of this module, or drop what iterates over it, and the blocks are free.
"""

import threading
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from hf_paged.sampling.row_streamer import RowStreamer


class BatchTextIteratorStreamer(RowStreamer):
    """Streams the text of every row of one `generate` call, in the pieces that `TextIteratorStreamer` gives.

    Run `generate` in a thread, and iterate over the streamer for ``(row, text)``, or over ``row(number)``, in
    others. An iterator that is closed or dropped ends its rows (once it has begun); so does `close`. What
    `generate` raises in its loop is raised here too; what it raises before, for bad arguments, is not seen here:
    give a `timeout` if that can happen.

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
        self._timeout, self._news = timeout, threading.Condition()
        self._prompts: torch.Tensor | None = None
        self._told: list[tuple[int, int | None]] = []  # (row, token) in order of arrival; None: the row is over
        self._error: BaseException | None = None

    def begin(self, prompts: torch.Tensor) -> None:
        self._tell(prompts=prompts)

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._tell(zip(rows, tokens))

    def end_rows(self, rows: Sequence[int]) -> None:
        self._tell((row, None) for row in rows)

    def fail(self, error: BaseException) -> None:
        self._tell(error=error)

    def close(self) -> None:
        super().close()
        self._tell()

    def _tell(self, told=(), prompts: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        with self._news:
            self._told.extend(told)
            self._prompts = self._prompts if prompts is None else prompts
            self._error = self._error or error
            self._news.notify_all()

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
        at, rows = 0, None
        while rows is None or rows:
            told = self._told_since(at, has_begun=rows is not None)
            if told is None:
                return
            at += len(told)
            if rows is None:
                numbers = range(len(self._prompts)) if wanted is None else [wanted]
                rows = {row: _RowText(self._tokenizer, self._skip_prompt, **self._decode_kwargs) for row in numbers}
                for row, text in rows.items():
                    yield from ((row, part) for part in text.put_all(self._prompts[row]))
            for row, token in told:
                if row in rows:
                    text = rows[row] if token is not None else rows.pop(row)
                    parts = text.end_all() if token is None else text.put_all(torch.tensor([token]))
                    yield from ((row, part) for part in parts)

    def _told_since(self, at: int, has_begun: bool) -> list[tuple[int, int | None]] | None:
        """What was told since; waits for something. None: the streamer was closed, nothing will come."""
        with self._news:
            while len(self._told) == at and (has_begun or self._prompts is None):
                if self._error is not None:
                    raise self._error.with_traceback(None)  # Whose frames hold the call's cache.
                if self.is_closed:
                    return None
                if not self._news.wait(self._timeout):
                    raise TimeoutError(f"no token came for {self._timeout} seconds: give the streamer a longer timeout")
            return self._told[at:]


class _RowText(TextStreamer):
    """Cuts one row's tokens into pieces of text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._parts.append(text)

    def put_all(self, tokens: torch.Tensor) -> list[str]:
        """The text that is complete with these tokens."""
        self.put(tokens)
        return self._take()

    def end_all(self) -> list[str]:
        """The text that is left."""
        self.end()
        return self._take()

    def _take(self) -> list[str]:
        parts, self._parts = [part for part in self._parts if part], []
        return parts
