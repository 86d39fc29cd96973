"""A needle in a haystack: a sentence with a number, hidden at some depth of a long text, and a question about it."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_CITIES = ("Arlon", "Brest", "Cadiz", "Dover", "Essen", "Faro", "Ghent", "Hove", "Imola", "Jena", "Kiel", "Lecce")
_QUESTION = "\n\nQuestion: what is the secret number of {city}?\nAnswer: The secret number of {city} is"


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question about it, and the answer."""

    sentence: str
    question: str
    answer: str


def needle(seed: int, length: int, depth: float) -> Needle:
    """The needle of one cell of the grid; another cell has another number."""
    draw = random.Random(f"{seed} {length} {depth}")
    city, number = draw.choice(_CITIES), str(draw.randrange(10_000, 100_000))
    return Needle(f" The secret number of {city} is {number}. ", _QUESTION.format(city=city), number)


def prompt(tokenizer: PreTrainedTokenizerBase, hay: list[int], hidden: Needle, length: int, depth: float) -> list[int]:
    """Token ids of a haystack of `length` tokens with its question.

    Parameters
    ----------
    hay : list of int
        Tokens of running text, at least `length`.
    depth : float
        From 0, the needle comes first, to 1, it comes last.

    Raises
    ------
    ValueError
        If needle and question alone are longer.
    """
    sentence, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (hidden.sentence, hidden.question)
    )
    room = length - len(sentence) - len(question)
    if room < 0:
        raise ValueError(
            f"a haystack of {length} tokens has no room for needle and question: they take {length - room}"
        )
    at = round(depth * room)
    return hay[:at] + sentence + hay[at:room] + question
