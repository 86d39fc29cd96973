"""What is timed: something that turns prompts into tokens."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Lengths:
    """How long the answers are.

    Attributes
    ----------
    new_tokens : int
        At most so many a row; exactly so many if rows do not stop.
    stops : bool
        Whether the end-of-sequence token ends a row.
    """

    new_tokens: int
    stops: bool = True


class Contender(Protocol):
    """One way to generate.

    Attributes
    ----------
    batch : int or None
        Rows that it takes at a time; None: as many as it likes.
    """

    name: str
    batch: int | None

    def obstacle(self) -> str | None:
        """Why it cannot run here, in a few words; None if it can."""

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        """Greedy answers, the new tokens of each prompt up to its end."""
