"""Sliding windows over a text, and their likelihood through a cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged_evals.accuracy.likelihood import token_log_likelihoods


@dataclass(frozen=True)
class Window:
    """Tokens of a text, of which all from `scored` on are predicted; those before are only context."""

    ids: list[int]
    scored: int


def windows(ids: list[int], length: int, stride: int) -> Iterator[Window]:
    """Windows of `length` that begin every `stride` tokens; each token but the first is scored once.

    The text's tail that fills no window is left out.
    """
    for begin in range(0, len(ids) - length + 1, stride):
        yield Window(ids[begin : begin + length], 1 if begin == 0 else length - stride)


def losses(model: PreTrainedModel, batch: list[Window], chunk: int) -> list[torch.Tensor]:
    """The negative log-likelihood of each scored token, float64, a tensor ``[scored tokens]`` a window.

    The windows, all of one length, go through a cache `chunk` tokens at a time: all but the first of them attend
    to what the cache holds.
    """
    ids = torch.tensor([window.ids for window in batch], device=model.device)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for begin in range(0, ids.shape[1], chunk):
            logits = model(ids[:, begin : begin + chunk], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
            follow = ids[:, begin + 1 : begin + chunk + 1]
            found.append(-token_log_likelihoods(logits[:, : follow.shape[1]], follow))
    whole = torch.cat(found, dim=1)  # [batch, length - 1]
    return [row[window.scored - 1 :] for row, window in zip(whole, batch)]
