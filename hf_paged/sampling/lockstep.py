"""Lockstep: stopping criteria that are asked about the whole batch, in the order in which dense ``generate`` asks."""

from collections.abc import Callable, Iterator, Sequence

from transformers import StoppingCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from hf_paged.sampling.cancellation import Cancellation
from hf_paged.sampling.stopping import StoppingRules

# A row that one of these ends is over, whatever the other criteria say of it and of other rows.
_ENDS_OF_A_ROW = (Cancellation, EosTokenCriteria, MaxLengthCriteria)


class Lockstep:
    """Which rows of a call end, by criteria of any kind: they may look at all rows, count their calls, or keep state.

    They are asked once for each number of tokens, when every row has as many. A row that is ahead of the others runs
    on meanwhile; what it has generated past its end is dropped. Where no criterion knows an end token, dense writes no
    pads: rows that are over go on until all of them are.

    Parameters
    ----------
    criteria : sequence of StoppingCriteria
        All of the call.
    open_rows : set of int
        Rows that have not ended. Changed in place; the owner may take rows out of it.

    Attributes
    ----------
    writes_pads : bool
        Whether a row that has ended is filled up with pads.
    end : int or None
        Tokens generated when the last row ended; None while rows are open.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], open_rows: set[int]):
        self.writes_pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.end: int | None = None
        # A lone row needs none: the criteria themselves are asked at once.
        ends = [criterion for criterion in criteria if type(criterion) in _ENDS_OF_A_ROW and len(open_rows) > 1]
        self._rules = StoppingRules(ends)
        self._open, self._running = open_rows, set(open_rows)
        self._over: set[int] = set()  # Rows that the criteria have ended.
        self._asked = 0  # The number of tokens that the criteria were asked about last.

    @property
    def has_running_rows(self) -> bool:
        """Tell whether some row needs another token."""
        return not self._open.isdisjoint(self._running)

    def runs(self, row: int) -> bool:
        """Tell whether a row needs another token."""
        return row in self._open and row in self._running

    def stop(self, rows: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Stop the rows that their newest token or their length ends, as in `StoppingRules.are_over`."""
        over = self._rules.are_over(tokens, lengths)
        self._running.difference_update(row for row, is_over in zip(rows, over) if is_over)

    def judge(
        self, counts: Sequence[int], ask: Callable[[int], Sequence[bool]]
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """Ask about every number of tokens that all rows have reached by now.

        Parameters
        ----------
        counts : sequence of int
            Tokens that each row has generated.
        ask : callable
            Of a number of tokens: whether each row is over with so many.

        Yields
        ------
        (count, rows, ended)
            A number of tokens, the rows that had not ended before it, and those of them that end with it. Where
            `writes_pads`, ended rows must hold pads from there on before the next is asked for.
        """
        while self._open and self._asked < self._reached(counts):
            self._asked += 1
            rows = sorted(self._open - self._over)
            over = ask(self._asked)
            ended = [row for row in rows if over[row]]
            self._over.update(ended)
            if self.writes_pads or self._open <= self._over:
                self._open -= self._over
            if not self._open:
                self.end = self._asked
            yield self._asked, rows, ended
        if self._open and not self.has_running_rows:
            # A criterion has written over the end token that stopped a row, and the row has left.
            self._open.clear()
            self.end = self._asked

    def _reached(self, counts: Sequence[int]) -> int:
        """Tokens that every row has; one that runs no more is filled up with pads."""
        return min((counts[row] for row in self._open & self._running), default=max(counts))
