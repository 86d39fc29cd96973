"""Teacher forcing: the logits of each step of `generate` when the tokens are given."""

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

_NO_TOKEN = -1  # An end token among those that are given would turn the rest of its row into padding.


class _Forced(LogitsProcessor):
    """Leaves only the token that is given for the step."""

    def __init__(self, tokens: torch.Tensor):  # [batch, steps]
        self._tokens, self._step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._tokens[:, self._step, None]
        self._step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def forced_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], steps: int
) -> torch.Tensor:
    """Logits for the last `steps` tokens of each row, which are given: a decode step for each token.

    Parameters
    ----------
    rows : list of list of int
        Tokens; all but the last `steps` of a row are its prompt.

    Returns
    -------
    torch.Tensor
        ``[len(rows), steps, vocab]`` in the model's dtype.
    """
    prompts = [row[:-steps] for row in rows]
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left").to(model.device)
    forced = torch.tensor([row[-steps:] for row in rows], device=model.device)
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=_NO_TOKEN,
        logits_processor=[_Forced(forced)],
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, dim=1)


def exact_logits(exact: PreTrainedModel, row: list[int], steps: int) -> torch.Tensor:
    """The same in one forward of the float64 model, ``[steps, vocab]``."""
    ids = torch.tensor([row[:-1]], device=exact.device)
    with torch.no_grad():
        return exact(ids, use_cache=False, logits_to_keep=steps).logits[0]
