"""Shortlist: the few tokens of the vocabulary that top-k leaves to what comes after it.

Top-p sorts what it is given; over a vocabulary of 50,000 that takes longer than all else in choosing a token.
"""

from collections.abc import Sequence

import torch
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper


def process(processors: Sequence, scores: torch.Tensor) -> torch.Tensor:
    """What processors that look at no tokens make of ``[rows, vocab]``."""
    tokens = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
    return LogitsProcessorList(processors)(tokens, scores)


def shortlist(processors: Sequence, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list] | None:
    """The tokens that a top-k processor leaves, and some more, so that the others need not see the vocabulary.

    Parameters
    ----------
    processors : sequence
        Each treats a row as a set of scores, whatever their places are.
    logits : torch.Tensor
        ``[rows, vocab]``, not changed.

    Returns
    -------
    (tokens, scores, processors) or None
        Both ``[rows, count]``, and what is left to do with these scores, top-k included. None if there is no top-k,
        or something other than a temperature before it, or more tokens as likely as the last that it leaves.
    """
    at = next((index for index, one in enumerate(processors) if type(one) is TopKLogitsWarper), None)
    if at is None or any(type(one) is not TemperatureLogitsWarper for one in processors[:at]):
        return None
    kept = processors[at].top_k
    count = 2 * kept  # Few logits tie in number, in bfloat16 as well.
    if processors[at].filter_value != -float("inf") or 8 * count > logits.shape[1]:
        return None
    scores, tokens = logits.topk(count)
    scores = process(processors[:at], scores.float())
    if not bool((scores[:, kept - 1] > scores[:, -1]).all()):
        return None
    return tokens, scores, list(processors[at:])
