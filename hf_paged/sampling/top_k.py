"""Top-k first: the processors after it see the few tokens that it leaves, not the vocabulary.

Top-p sorts the scores it is given; over a vocabulary of 50,000 that takes longer than all else in choosing a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper

from hf_paged.sampling.processors import Processor, apply_token_free, shared_properties


@dataclass(frozen=True)
class TopKSplit:
    """Processors as they come before and after the cut to a few tokens.

    Attributes
    ----------
    top_k : int
        Tokens that the first top-k processor leaves.
    before : sequence of Processor
        Keep the order of the scores, so the largest logits get the largest scores.
    after : sequence of Processor
        The top-k processor and what follows it, all place-free.
    """

    top_k: int
    before: Sequence[Processor]
    after: Sequence[Processor]


def split_at_top_k(processors: Sequence[Processor]) -> TopKSplit | None:
    """Split processors at the first top-k; None if there is none, or if another one needs the whole vocabulary.

    A temperature is all that may come before it, and place-free processors are all that may follow.
    """
    for at, processor in enumerate(processors):
        if type(processor) is TopKLogitsWarper:
            is_cut = processor.filter_value == -float("inf")  # Else the tokens cut off keep a share.
            after = processors[at:]
            is_split = is_cut and shared_properties(after).place_free
            return TopKSplit(processor.top_k, processors[:at], after) if is_split else None
        if type(processor) is not TemperatureLogitsWarper:
            return None
    return None


def keep_top_k(split: TopKSplit, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keep the tokens that top-k leaves, and some more: `split.after` cuts these off.

    Parameters
    ----------
    split : TopKSplit
    logits : torch.Tensor
        ``[rows, vocab]``, not changed.

    Returns
    -------
    (tokens, scores) or None
        Both ``[rows, kept]``: int64, and float32 after `split.before`. None if the vocabulary is not much larger than
        what would be kept, or if some row has more tokens as likely as its last one than were kept.
    """
    count = 2 * split.top_k  # Few logits tie in number, in bfloat16 as well.
    if 8 * count > logits.shape[1]:
        return None
    kept, tokens = logits.topk(count)  # Both [rows, kept], the largest first.
    scores = apply_token_free(split.before, kept.float())
    if not bool((scores[:, split.top_k - 1] > scores[:, -1]).all()):
        return None
    return tokens, scores
