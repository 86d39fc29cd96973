"""Seat: a call in the engine, and the news that it waits for."""

import threading
from collections import deque

import torch

from .call import Call
from .errors import OutOfBlocksError
from .request import Request
from .scheduler import Schedule, Scheduler


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


def deliver(seats: dict[Request, Seat], scheduler: Scheduler, schedule: Schedule, logits: torch.Tensor) -> list[Seat]:
    """Queue the logits of a step that has run, ``[samples, vocab]``, for their calls; the calls that got some.

    Followers of a row whose prompt is stored now start, from its logits. Called under the engine's lock and the
    pool's.
    """
    sampled = [chunk.request for chunk in schedule.chunks if chunk.samples]
    parts: dict[Seat, list[int]] = {}
    rows: dict[Seat, list[Request]] = {}
    for index, request in enumerate(sampled):
        seat = seats.get(request)
        if seat is None:  # Its call has left meanwhile.
            continue
        followers = list(request.followers)
        scheduler.follow(request)
        rows.setdefault(seat, []).extend([request, *followers])
        parts.setdefault(seat, []).extend([index] * (1 + len(followers)))
    for seat, requests in rows.items():
        first, last = parts[seat][0], parts[seat][-1]
        is_slice = parts[seat] == list(range(first, last + 1))
        seat.logits.append((requests, logits[first : last + 1] if is_slice else logits[parts[seat]]))
        seat.is_sampling = not seat.call.is_quick
    return list(rows)
