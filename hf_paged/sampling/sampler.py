"""Sampler: how a call chooses its next tokens from logits, if that depends on nothing else.

Calls with equal recipes choose together: a step of many small calls costs as much as one of a large call.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.sampling.categorical import draw, likeliest
from hf_paged.sampling.top_k import process, shortlist

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Sampler:
    """Processors that look at no tokens, and then the likeliest token or a free draw.

    Two are equal if they choose alike.
    """

    key: Hashable
    processors: tuple = field(compare=False, repr=False)
    draws: bool
    device: torch.device

    @classmethod
    def of(cls, processors: Sequence, draws: bool, device: torch.device) -> "Sampler | None":
        """The recipe of such processors; None if one holds more than numbers and texts: it is not compared."""
        settings = [vars(processor) for processor in processors]
        if not all(isinstance(value, _PLAIN) for some in settings for value in some.values()):
            return None
        key = tuple((type(one), tuple(sorted(some.items()))) for one, some in zip(processors, settings))
        return cls(key, tuple(processors), draws, device)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, ``[rows]`` int64, from ``[rows, vocab]``, which is not changed.

        Raises
        ------
        RuntimeError
            If a row cannot be drawn from.
        """
        logits = logits.to(self.device)
        if not self.processors and not self.draws:
            # Dense looks at float32, in which two numbers of float64 may be one.
            return likeliest(logits.float() if logits.dtype == torch.float64 else logits)
        if self.draws and (found := shortlist(self.processors, logits)) is not None:
            tokens, scores, processors = found
            return tokens.gather(1, draw(process(processors, scores).softmax(dim=-1))[:, None]).squeeze(1)
        scores = process(self.processors, logits.to(torch.float32, copy=True))
        return draw(scores.softmax(dim=-1)) if self.draws else likeliest(scores)


def sample_together(
    recipes: Sequence[Sampler | None], logits: Sequence[torch.Tensor]
) -> list[torch.Tensor | Exception | None]:
    """Next tokens for the rows of several calls, those of equal recipes in one go.

    Parameters
    ----------
    recipes : sequence of Sampler or None
        One per call.
    logits : sequence of torch.Tensor
        ``[rows, vocab]`` for each call; not changed.

    Returns
    -------
    list of torch.Tensor, Exception or None
        ``[rows]`` int64 for each call. An error that was raised while it chose together with others: it is the error
        of one of them, or of none. None for a call without a recipe.
    """
    alike: dict[Sampler, list[int]] = {}
    for number, recipe in enumerate(recipes):
        if recipe is not None:
            alike.setdefault(recipe, []).append(number)
    chosen: list[torch.Tensor | Exception | None] = [None] * len(recipes)
    for recipe, numbers in alike.items():
        parts = [logits[number] for number in numbers]
        try:
            with torch.inference_mode(False), torch.no_grad():
                tokens = recipe.choose(torch.cat(parts) if len(parts) > 1 else parts[0])
        except Exception as error:
            for number in numbers:
                chosen[number] = error
            continue
        for number, part in zip(numbers, tokens.split([len(part) for part in parts])):
            chosen[number] = part
    return chosen
