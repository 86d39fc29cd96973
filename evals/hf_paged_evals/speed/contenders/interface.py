"""A contender: one way to turn prompts into tokens, which is timed."""

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lengths:
    """The length of the answers.

    Attributes
    ----------
    new_tokens : int
        At most so many a row; exactly so many if rows do not stop.
    stops : bool
        The end-of-sequence token ends a row.
    """

    new_tokens: int
    stops: bool = True


class Contender(Protocol):
    """One way to generate.

    Attributes
    ----------
    batch : int or None
        Rows that it takes at a time; None: all.
    pool_owner : PreTrainedModel or None
        The model whose pool its rows use; None: there is none.
    """

    name: str
    batch: int | None
    pool_owner: PreTrainedModel | None

    def obstacle(self) -> str | None:
        """The reason why it cannot run here, in a few words; None if it can."""

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        """Greedy answers, the new tokens of each prompt up to its end."""
