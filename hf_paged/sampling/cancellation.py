"""Cancellation: ends a `generate` call from another thread."""

import threading

import torch
from transformers import StoppingCriteria


class Cancellation(StoppingCriteria):
    """A stopping criterion that any thread may fulfil: the call returns with the tokens it has.

    Rows that run packed leave within a step, also those that still wait; transformers' own loop ends after its
    next token.

    Examples
    --------
    >>> cancellation = Cancellation()
    >>> threading.Timer(5, cancellation.cancel).start()  # doctest: +SKIP
    >>> model.generate(**inputs, stopping_criteria=[cancellation])  # doctest: +SKIP
    """

    def __init__(self):
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the call. May be called from any thread, from a finalizer, and more than once."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Tell whether the call shall end. It shall when the main thread has ended: the program waits to exit."""
        return self._is_cancelled or not threading.main_thread().is_alive()

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_cancelled, device=input_ids.device, dtype=torch.bool)
