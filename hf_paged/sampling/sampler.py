"""Sampler: the choice of next tokens that the driving thread makes for a call, from logits alone.

Calls with equal samplers choose together: a step of many small calls costs as much as one of a large call.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.sampling import categorical
from hf_paged.sampling.next_tokens import NextTokens
from hf_paged.sampling.processors import Processor, apply_token_free
from hf_paged.sampling.top_k import TopKSplit, keep_top_k, split_at_top_k

# Of the probabilities ``[rows, vocab]`` of a call: its exponential noise for them, in their shape, dtype and device.
Noise = Callable[[torch.Tensor], torch.Tensor]
_COMPARABLE = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Sampler:
    """Token-free processors, and then the most likely token or one sampled at random. Made by `of`.

    Two samplers are equal if they choose alike.

    Attributes
    ----------
    key : hashable
        The classes of the processors and their settings.
    processors : sequence of Processor
    do_sample : bool
        Sample from the distribution; else take the most likely token.
    device : torch.device
        Where the tokens are wanted.
    replays : bool
        Sample with the random numbers of each call, see `Noise`; else with any.
    top_k : TopKSplit or None
        The processors of a sampler that samples on the CPU with any numbers, split at top-k where that is possible.
    """

    key: Hashable
    processors: Sequence[Processor] = field(compare=False, repr=False)
    do_sample: bool
    device: torch.device
    replays: bool
    top_k: TopKSplit | None = field(compare=False, repr=False)

    @classmethod
    def of(
        cls, processors: Sequence[Processor], do_sample: bool, device: torch.device, replays: bool = False
    ) -> "Sampler | None":
        """Make the sampler of some token-free processors.

        None if a processor holds anything but numbers and texts: two such cannot be compared.
        """
        processors = tuple(processors)
        settings = [vars(processor) for processor in processors]
        if not all(isinstance(value, _COMPARABLE) for some in settings for value in some.values()):
            return None
        # On other devices than the CPU the check for ties would wait for the device.
        may_split = do_sample and not replays and device.type == "cpu"
        top_k = split_at_top_k(processors) if may_split else None
        key = tuple((type(one), tuple(sorted(some.items()))) for one, some in zip(processors, settings))
        return cls(key, processors, do_sample, device, replays, top_k)

    def choose(self, logits: torch.Tensor, noise: Noise | None = None) -> NextTokens:
        """Choose the next token of each row.

        Parameters
        ----------
        logits : torch.Tensor
            ``[rows, vocab]``, not changed.
        noise : Noise or None
            Of these rows, if the sampler replays.
        """
        logits = logits.to(self.device)
        if not self.processors and not self.do_sample:
            # Dense looks at float32, in which two numbers of float64 may be one.
            return NextTokens(categorical.argmax(logits.float() if logits.dtype == torch.float64 else logits))
        if self.top_k is not None and (kept := keep_top_k(self.top_k, logits)) is not None:
            tokens, scores = kept
            place = categorical.sample(apply_token_free(self.top_k.after, scores).softmax(dim=-1))
            return NextTokens(tokens.gather(1, place.ids[:, None]).squeeze(1), place.is_valid)
        scores = apply_token_free(self.processors, logits.to(torch.float32, copy=True))
        if not self.do_sample:
            return NextTokens(categorical.argmax(scores))
        probabilities = scores.softmax(dim=-1)
        if noise is None:
            return categorical.sample(probabilities)
        return categorical.sample_with(probabilities, noise(probabilities))


def sample_together(
    samplers: Sequence[Sampler | None], logits: Sequence[torch.Tensor], noises: Sequence[Noise]
) -> list[NextTokens | Exception | None]:
    """Choose next tokens for the rows of several calls, those of equal samplers in one go.

    Parameters
    ----------
    samplers : sequence of Sampler or None
        One per call.
    logits : sequence of torch.Tensor
        ``[rows, vocab]`` for each call; not changed.
    noises : sequence of Noise
        For each call, asked if its sampler replays.

    Returns
    -------
    list of NextTokens, Exception or None
        For each call. An error that was raised while it chose together with others: it is the error of one of them,
        or of none. None for a call without a sampler.
    """
    alike: dict[Sampler, list[int]] = {}
    for number, sampler in enumerate(samplers):
        if sampler is not None:
            alike.setdefault(sampler, []).append(number)
    chosen: list[NextTokens | Exception | None] = [None] * len(samplers)
    for sampler, numbers in alike.items():
        parts = [logits[number] for number in numbers]
        sizes = [len(part) for part in parts]
        noise = _noise_of_all([noises[number] for number in numbers], sizes) if sampler.replays else None
        try:
            with torch.inference_mode(False), torch.no_grad():
                tokens = sampler.choose(torch.cat(parts) if len(parts) > 1 else parts[0], noise)
        except Exception as error:
            for number in numbers:
                chosen[number] = error
            continue
        for number, part in zip(numbers, tokens.split(sizes)):
            chosen[number] = part
    return chosen


def _noise_of_all(noises: Sequence[Noise], sizes: Sequence[int]) -> Noise:
    """Join the noise of several calls, by their numbers of rows."""

    def noise(probabilities: torch.Tensor) -> torch.Tensor:
        parts = [draw(part) for draw, part in zip(noises, probabilities.split(sizes))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return noise
