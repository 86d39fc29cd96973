"""StoppingRules: transformers' stopping criteria, decided from numbers instead of tensors.

A step asks the criteria about every row; a tensor or two for each would take longer than all else in noting a token.
"""

import time
from collections.abc import Sequence

import torch
from transformers import StoppingCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from hf_paged.sampling.cancellation import Cancellation


class StoppingRules:
    """The end tokens, lengths, times and cancellations at which a call's rows end.

    Parameters
    ----------
    criteria : sequence of StoppingCriteria
        Of the classes in `KINDS`, and of no class derived from one.

    Attributes
    ----------
    max_length : int or None
        Tokens with which every row ends, pads on the left included.
    """

    KINDS = frozenset({Cancellation, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria})

    def __init__(self, criteria: Sequence[StoppingCriteria]):
        self._lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        self._times = [one for one in criteria if type(one) is MaxTimeCriteria]
        self._cancellations = [one for one in criteria if type(one) is Cancellation]
        self.max_length = min((one.max_length for one in self._lengths), default=None)
        ends = [one.eos_token_id.flatten().tolist() for one in criteria if type(one) is EosTokenCriteria]
        self._end_tokens = {token for tokens in ends for token in tokens}

    def are_over(self, tokens: Sequence[int], lengths: Sequence[int]) -> list[bool]:
        """Tell for each row whether it ends.

        Parameters
        ----------
        tokens : sequence of int
            The newest token of each row.
        lengths : sequence of int
            Tokens of each row with it, pads on the left included.
        """
        now = time.time()
        if any(now - one.initial_timestamp > one.max_time for one in self._times):
            return [True] * len(tokens)
        if any(one.is_cancelled for one in self._cancellations):
            return [True] * len(tokens)
        return [token in self._end_tokens or self._is_full(length) for token, length in zip(tokens, lengths)]

    def _is_full(self, length: int) -> bool:
        for one in self._lengths:
            if length >= one.max_length:
                return True
            if one.max_position_embeddings is not None and length > one.max_position_embeddings:
                one(torch.empty(1, length, dtype=torch.long), None)  # It has a warning to give.
        return False
