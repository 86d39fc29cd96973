"""Near-ties: divergences of two backends that rounding explains, by the judgement of a float64 forward."""

from dataclasses import dataclass

import torch

from hf_paged_evals.accuracy.generation import end_tokens
from hf_paged_evals.models.pair import ModelPair


@dataclass(frozen=True)
class Divergence:
    """The first difference of two rows, and how near to a tie the model was there.

    Attributes
    ----------
    at : int
        Index of the first new token that differs.
    margin : float
        Logits between the two likeliest tokens, in float64.
    gap : float
        Float64 logits between the likeliest token and the less likely one of the two that were chosen.
    error : float
        The largest error of the baseline's own logits here, against float64.
    """

    at: int
    margin: float
    gap: float
    error: float

    @property
    def is_near_tie(self) -> bool:
        """Tell whether two backends that both err no more than the baseline could disagree here."""
        return self.gap <= 2 * self.error


def judge(models: ModelPair, prompt: list[int], baseline: list[int], backend: list[int], at: int) -> Divergence | None:
    """The divergence of two continuations of a prompt at new token `at`; None where one of them just ends.

    Both were generated with `forced_length`: an end token may be the likeliest, and could not be chosen.
    """
    if at >= min(len(baseline), len(backend)):
        return None
    ids = torch.tensor([prompt + baseline[:at]], device=models.device)
    with torch.no_grad():
        exact = models.exact(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        rounded = models.baseline(ids, use_cache=False, logits_to_keep=1).logits[0, -1].double()
    allowed = torch.ones(len(exact), dtype=torch.bool, device=exact.device)
    allowed[list(end_tokens(models.baseline))] = False
    error = float((rounded - exact)[allowed].abs().max())
    exact = exact.masked_fill(~allowed, float("-inf"))
    top = exact.topk(2).values
    chosen = torch.stack([exact[baseline[at]], exact[backend[at]]])
    return Divergence(at, float(top[0] - top[1]), float(top[0] - chosen.min()), error)
