"""Reservations: blocks that a rectangular call will need, promised to it at entry. No tensors here.

Packed rows queue and can be preempted, one by one. Beams, assisted decoding and what falls back hold the blocks of
all their rows to their end, so they come in when all of these are free, or when nobody is left to wait for.
"""

import contextlib
import threading
import time
from collections.abc import Mapping

_PAUSE = 0.005  # Seconds between two looks at the pool.
_PATIENCE = 10.0  # Seconds without any progress on the pool, after which nobody is worth waiting for.
_LINGER = 0.1  # Seconds that the cache of a call may outlive its loop, inside ``generate``.


class _ThreadState(threading.local):
    def __init__(self):
        self.pools: list = []  # On which this thread runs calls, outermost first.
        self.reservations: list[Reservation] = []


_thread = _ThreadState()


class Reservation:
    """Blocks that others may not take, by attention group.

    Parameters
    ----------
    needs : mapping of GroupPool to int
        What the call holds at most, at any time.
    """

    def __init__(self, needs: Mapping):
        self._needs, self._left = dict(needs), dict(needs)

    def fits(self) -> bool:
        return all(group.blocks.spare_blocks >= count for group, count in self._left.items())

    def take(self) -> None:
        """Promise the blocks. Called under the pool's lock."""
        for group, count in self._left.items():
            group.blocks.reserved += count

    def draw(self, group, num_blocks: int) -> None:
        """Turn promised blocks of `group` into ones that this thread may allocate now, as far as they go."""
        drawn = min(num_blocks, self._left.get(group, 0))
        if drawn:
            self._left[group] -= drawn
            group.blocks.reserved -= drawn

    def put_back(self, group, num_blocks: int) -> None:
        """Promise blocks again that the call has freed: it will want as many later."""
        left = self._left.get(group, 0)
        back = min(num_blocks, self._needs.get(group, 0) - left)
        if back > 0:
            self._left[group] = left + back
            group.blocks.reserved += back

    def give_up(self) -> None:
        """Take back what is left of the promise. Called under the pool's lock."""
        for group, count in self._left.items():
            group.blocks.reserved -= count
        self._needs.clear(), self._left.clear()


class Patience:
    """Tells how long it is worth waiting for the calls on a pool. Used under its lock.

    Parameters
    ----------
    pool : KVPool
    """

    def __init__(self, pool):
        self._pool, self._seen, self._since = pool, None, 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing was read from the pages for long."""
        if self._pool.page_reads != self._seen:
            self._seen, self._since = self._pool.page_reads, time.monotonic()
        return time.monotonic() - self._since > _PATIENCE

    @property
    def is_for_rectangles(self) -> bool:
        """Whether rectangular calls run and come on, or one has just ended: blocks will be free soon."""
        just_ended = time.monotonic() - self._pool.last_reserved < _LINGER
        return (bool(self._pool.reservations) or just_ended) and not self.is_over


def draw(group, num_blocks: int) -> None:
    """Let the call that runs on this thread use what it reserved. Called under the pool's lock."""
    for reservation in _thread.reservations:
        reservation.draw(group, num_blocks)


@contextlib.contextmanager
def keeping(group):
    """Blocks that the call on this thread frees inside stay promised to it. Entered under the pool's lock."""
    spare = group.blocks.spare_blocks
    yield
    freed = group.blocks.spare_blocks - spare
    for reservation in _thread.reservations:
        reservation.put_back(group, freed)


def is_inside(pool) -> bool:
    """Whether this thread runs a call on `pool` already, which waits for what it does now."""
    return any(other is pool for other in _thread.pools)


@contextlib.contextmanager
def entered(pool):
    """Mark that this thread runs a call on `pool`: calls that its callbacks make must not wait for it."""
    _thread.pools.append(pool)
    try:
        yield
    finally:
        _thread.pools.pop()


@contextlib.contextmanager
def reserve(pool, needs: Mapping):
    """Run a rectangular call: wait until its blocks are free, all of them, and keep them for this thread.

    Where nobody else runs on the pool, or this call is made from inside another, there is nothing to wait for: it
    takes blocks as it needs them, past the budget if it must.

    Parameters
    ----------
    pool : KVPool
    needs : mapping of GroupPool to int
        Blocks, at most.
    """
    reservation = Reservation(needs)
    is_kept = not is_inside(pool) and _wait(pool, reservation)
    with entered(pool):
        if not is_kept:
            yield
            return
        _thread.reservations.append(reservation)
        try:
            yield
        finally:
            _thread.reservations.remove(reservation)
            with pool.lock:
                reservation.give_up()
                pool.reservations.remove(reservation)
                pool.last_reserved = time.monotonic()


def _wait(pool, reservation: Reservation) -> bool:
    """Whether the blocks were promised; False if they are not there and nobody will free them."""
    patience = Patience(pool)
    with pool.lock:
        pool.num_waiting += 1
    try:
        while True:
            with pool.lock:
                if reservation.fits():
                    reservation.take()
                    pool.reservations.append(reservation)
                    return True
                are_packed = any(engine.is_running for engine in pool.engines)
                if not (patience.is_for_rectangles or (are_packed and not patience.is_over)):
                    return False
            time.sleep(_PAUSE)
    finally:
        with pool.lock:
            pool.num_waiting -= 1
