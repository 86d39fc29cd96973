"""How likely a model finds each of several continuations of one context, through a cache that they share."""

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


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
    """The log-likelihood of each choice after the context, in nats, summed over its tokens in float64.

    The context runs once; its cache is repeated for the choices, which then attend to it in one batch, padded on
    the right.
    """
    longest, pad = max(map(len, choices)), choices[0][0]
    ids = torch.tensor([choice + [pad] * (longest - len(choice)) for choice in choices], device=model.device)
    real = torch.tensor([[at < len(choice) for at in range(longest)] for choice in choices], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(torch.tensor([context], device=model.device), past_key_values=cache, use_cache=True).logits
        cache.batch_repeat_interleave(len(choices))
        mask = torch.cat([real.new_ones(len(choices), len(context)), real], dim=1).long()
        rest = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first[:, -1:].expand(len(choices), -1, -1), rest[:, :-1]], dim=1)  # [choices, longest, vocab]
    found = logits.double().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return found.masked_fill(~real, 0.0).sum(1).tolist()
