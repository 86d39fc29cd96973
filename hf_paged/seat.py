"""Seat: a call in the engine, and the news that it waits for."""

import threading
from collections import deque

import torch

from .call import Call
from .errors import OutOfBlocksError
from .request import Request


class Seat:
    """What the engine has for a call.

    A call sleeps on a condition of its own: a step wakes only those that it has news for.

    Parameters
    ----------
    call : Call
    lock : threading.RLock
        The engine's; everything here is read and written under it.
    is_inside : bool
        Whether a callback of another call on the pool made this one, and waits for it.
    """

    def __init__(self, call: Call, lock, is_inside: bool):
        self.call, self.is_inside = call, is_inside
        self.news = threading.Condition(lock)
        self.is_asleep = False
        self.logits: deque[tuple[list[Request], torch.Tensor]] = deque()
        self.failed: list[tuple[Request, OutOfBlocksError]] = []
        self.error: BaseException | None = None
        self.is_sampling = False  # In the call's own thread; the next step may wait for it.
