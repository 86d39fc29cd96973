"""Refusal: why a model has no engine."""

from dataclasses import dataclass

from hf_paged.reasons import Why


@dataclass(frozen=True)
class Refusal:
    """The outcome of a trial that a model has failed: its calls run transformers' own loop.

    Attributes
    ----------
    why : Why
    is_lasting : bool
        Whether the model itself is the cause. If not, the next call tries it again.
    """

    why: Why
    is_lasting: bool = True
