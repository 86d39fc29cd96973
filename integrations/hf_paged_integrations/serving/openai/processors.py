"""The logits processors of the server's own: penalties, biases, seeds, and the log-probabilities of tokens."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from hf_paged.sampling.processors import Processor, Properties, register


class PerRow(LogitsProcessor):
    """A processor for each row of a call, which may keep state: rows run packed.

    Parameters
    ----------
    make : callable
        Of the number of a row: its processor. It is called once for each row.
    """

    def __init__(self, make: Callable[[int], Processor]):
        self._make, self._rows = make, dict[int, Processor]()

    def for_row(self, row: int) -> Processor:
        """Return the processor of one row."""
        if row not in self._rows:
            self._rows[row] = self._make(row)
        return self._rows[row]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Process the whole batch, as transformers' own loop asks for it. ``[rows, positions]``, ``[rows, vocab]``."""
        rows = range(len(scores))
        return torch.cat([self.for_row(row)(input_ids[row, None], scores[row, None]) for row in rows])


class Penalties(LogitsProcessor):
    """OpenAI's penalties: each token loses for every time that it was generated, and once for being there at all.

    Parameters
    ----------
    frequency, presence : float
        What a token loses.
    prompt_length : int
        Tokens at the beginning that do not count.
    """

    def __init__(self, frequency: float, presence: float, prompt_length: int):
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]  # [rows, tokens]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of some tokens.

    Parameters
    ----------
    biases : mapping of int to float
        By token.
    device : torch.device
        Of the scores.
    """

    def __init__(self, biases: Mapping[int, float], device: torch.device):
        self._tokens = torch.tensor(list(biases), dtype=torch.long, device=device)  # [biases]
        self._values = torch.tensor(list(biases.values()), device=device)  # [biases]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, self._tokens, self._values.to(scores.dtype).expand(len(scores), -1))


register(Penalties, Properties(row_wise=True, cheap=True))
register(LogitBias, Properties(row_wise=True, token_free=True, cheap=True))


def seeded(seed: int) -> PerRow:
    """Return the processor, last of all, that samples each token with numbers of the seed alone.

    What other requests run meanwhile has no part in them. It leaves one token of each row, for a greedy choice.
    """
    return PerRow(lambda row: _SeededChoice(f"{seed}/{row}"))


class _SeededChoice:
    """Samples the tokens of one row. The numbers depend on a key and on the length of the row."""

    def __init__(self, key: str):
        self._key = key

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._key}/{input_ids.shape[1]}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        noise = torch.empty(scores.shape).exponential_(1, generator=generator)  # [1, vocab]
        token = (scores.softmax(-1) / noise.to(scores)).argmax(-1, keepdim=True)  # [1, 1]
        return torch.full_like(scores, -float("inf")).scatter_(1, token, 0.0)


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and those of the most likely ones in its place.

    Attributes
    ----------
    token : int
    logprob : float
    top : list of (int, float)
        The most likely tokens, the first the likeliest.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class LogprobRecorder:
    """Notes the model's distribution before anything changes it, until the token that comes of it is known.

    Parameters
    ----------
    num_top : int
        Most likely tokens that are noted.

    Attributes
    ----------
    processor : PerRow
        It changes no score. It is to be the first.
    """

    def __init__(self, num_top: int):
        self._num_top = num_top
        self._logprobs: dict[int, torch.Tensor] = {}  # By row: [vocab]
        self.processor = PerRow(lambda row: lambda ids, scores: self._note(row, scores))

    def _note(self, row: int, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs[row] = scores[0].float().log_softmax(-1)
        return scores

    def of(self, row: int, token: int) -> TokenLogprobs:
        """Return what is noted of a row's newest token."""
        logprobs = self._logprobs[row]
        values, tokens = logprobs.topk(min(self._num_top, len(logprobs)))  # Both [top]
        return TokenLogprobs(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist())))
