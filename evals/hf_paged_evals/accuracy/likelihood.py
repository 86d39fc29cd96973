"""Log-likelihoods of several continuations of one context, through a cache that they share."""

import copy

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_paged.compat.transformers import CACHE_ARGUMENT


def split(tokenizer: PreTrainedTokenizerBase, context: str, choices: list[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a context and of what each choice adds to it.

    The text is tokenized as a whole: where a choice changes the context's last tokens, they count as its own.
    """
    wholes = [tokenizer(context + choice)["input_ids"] for choice in choices]
    shared = len(tokenizer(context)["input_ids"])
    while any(whole[:shared] != wholes[0][:shared] or len(whole) <= shared for whole in wholes):
        shared -= 1
    return wholes[0][:shared], [whole[shared:] for whole in wholes]


def log_likelihoods(model: PreTrainedModel, context: list[int], choices: list[list[int]]) -> list[float]:
    """The log-likelihood of each choice after the context, in nats.

    The context runs once; each choice goes on from a copy of its cache. Pages are shared by the copies.
    """
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        last = model(torch.tensor([context], device=model.device), use_cache=True, **{CACHE_ARGUMENT: cache}).logits[
            :, -1:
        ]
        for choice in choices:
            ids = torch.tensor([choice], device=model.device)
            rest = model(ids, use_cache=True, **{CACHE_ARGUMENT: copy.deepcopy(cache)}).logits[:, :-1]
            found.append(float(token_log_likelihoods(torch.cat([last, rest], dim=1), ids).sum()))
    return found


def token_log_likelihoods(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-likelihood of each token, float64.

    Parameters
    ----------
    logits : torch.Tensor
        ``[batch, positions, vocab]``; computed with in float32 at least.
    ids : torch.Tensor
        ``[batch, positions]``
    """
    logits = logits.float() if logits.itemsize < 4 else logits
    chosen = logits.gather(2, ids[..., None])[..., 0]
    return chosen.double() - logits.logsumexp(-1).double()
