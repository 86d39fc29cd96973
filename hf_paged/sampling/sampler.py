"""Sampler: the choice of next tokens that the driving thread makes for a call, from logits alone.

Calls with equal samplers choose together: a step of many small calls costs as much as one of a large call.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.sampling import categorical
from hf_paged.sampling.next_tokens import NextTokens
from hf_paged.sampling.processors import Processor, apply_token_free
from hf_paged.sampling.top_k import TopKSplit, keep_top_k, split_at_top_k

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
    top_k : TopKSplit or None
        The processors of a sampler that samples on the CPU, split at top-k where that is possible.
    """

    key: Hashable
    processors: Sequence[Processor] = field(compare=False, repr=False)
    do_sample: bool
    device: torch.device
    top_k: TopKSplit | None = field(compare=False, repr=False)

    @classmethod
    def of(cls, processors: Sequence[Processor], do_sample: bool, device: torch.device) -> "Sampler | None":
        """Make the sampler of some token-free processors.

        None if a processor holds anything but numbers and texts: two such cannot be compared.
        """
        processors = tuple(processors)
        settings = [vars(processor) for processor in processors]
        if not all(isinstance(value, _COMPARABLE) for some in settings for value in some.values()):
            return None
        # On other devices than the CPU the check for ties would wait for the device.
        top_k = split_at_top_k(processors) if do_sample and device.type == "cpu" else None
        key = tuple((type(one), tuple(sorted(some.items()))) for one, some in zip(processors, settings))
        return cls(key, processors, do_sample, device, top_k)

    def choose(self, logits: torch.Tensor) -> NextTokens:
        """Choose the next token of each row.

        Parameters
        ----------
        logits : torch.Tensor
            ``[rows, vocab]``, not changed.
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
        if self.do_sample:
            return categorical.sample(scores.softmax(dim=-1))
        return NextTokens(categorical.argmax(scores))


def sample_together(
    samplers: Sequence[Sampler | None], logits: Sequence[torch.Tensor]
) -> list[NextTokens | Exception | None]:
    """Choose next tokens for the rows of several calls, those of equal samplers in one go.

    Parameters
    ----------
    samplers : sequence of Sampler or None
        One per call.
    logits : sequence of torch.Tensor
        ``[rows, vocab]`` for each call; not changed.

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
        try:
            with torch.inference_mode(False), torch.no_grad():
                tokens = sampler.choose(torch.cat(parts) if len(parts) > 1 else parts[0])
        except Exception as error:
            for number in numbers:
                chosen[number] = error
            continue
        for number, part in zip(numbers, tokens.split([len(part) for part in parts])):
            chosen[number] = part
    return chosen
