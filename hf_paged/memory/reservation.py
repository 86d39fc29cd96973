"""Reservations: blocks that a rectangular call will need, promised to it at entry. No tensors here.

Packed rows queue and can be preempted, one by one. Beams, assisted decoding and what falls back hold the blocks of
all their rows to their end, so they come in when all of these are free, or when nobody is left to wait for.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from hf_paged.atomic import Undo, atomically

_PAUSE = 0.005  # Seconds between two looks at the pool.
_PATIENCE = 10.0  # Seconds without any progress on the pool, after which nobody is worth waiting for.
_LINGER = 0.1  # Seconds that the cache of a call may outlive its loop, inside ``generate``.


class _ThreadState(threading.local):
    pools: tuple = ()  # On which this thread runs calls, outermost first.
    reservations: "tuple[Reservation, ...]" = ()


_thread = _ThreadState()


class Reservation:
    """Blocks that others may not take, by attention group. Changed in atomic sections, under the pool's lock.

    Parameters
    ----------
    needs : mapping of KVCacheGroup to int
        Blocks that the call holds at most, at any time.
    """

    def __init__(self, needs: Mapping):
        self._needs, self._left = dict(needs), dict.fromkeys(needs, 0)
        self._thread = threading.get_ident()

    @property
    def is_of_this_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def fits(self) -> bool:
        return all(group.blocks.spare_blocks >= count for group, count in self._needs.items())

    def begin(self, pool) -> None:
        """Promise the blocks."""
        for group, count in self._needs.items():
            group.blocks.reserved += count
            self._left[group] = count
        pool.waiting.discard(self)
        pool.reservations.append(self)

    def draw(self, group, num_blocks: int) -> None:
        """Turn promised blocks of `group` into ones that the call may allocate now, as far as they go."""
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

    def end(self, pool) -> None:
        """Take back what is left of the promise. Idempotent."""
        pool.waiting.discard(self)
        if self not in pool.reservations:
            return
        for group, count in self._left.items():
            group.blocks.reserved -= count
        self._needs.clear(), self._left.clear()
        pool.reservations.remove(self)
        pool.last_reserved = time.monotonic()


class StallDetector:
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
    def is_for_reserved_calls(self) -> bool:
        """Whether rectangular calls run and come on, or one has just ended: blocks will be free soon."""
        just_ended = time.monotonic() - self._pool.last_reserved < _LINGER
        return (bool(self._pool.reservations) or just_ended) and not self.is_over


def of_this_thread() -> "tuple[Reservation, ...]":
    """The reservations of the calls that run on this thread."""
    return _thread.reservations


@contextlib.contextmanager
def keeping(group, promised: Sequence[Reservation] | None = None) -> Iterator[None]:
    """Blocks that a call frees inside stay promised to it. Entered under the pool's lock.

    Parameters
    ----------
    group : KVCacheGroup
    promised : sequence of Reservation or None
        The call's; None: those of this thread.
    """
    spare = group.blocks.spare_blocks
    yield
    freed = group.blocks.spare_blocks - spare
    for reservation in of_this_thread() if promised is None else promised:
        reservation.put_back(group, freed)


def is_inside(pool) -> bool:
    """Whether this thread runs a call on `pool` already, which waits for what it does now."""
    return any(other is pool for other in _thread.pools)


@contextlib.contextmanager
def entered(pool, *reservations: Reservation) -> Iterator[None]:
    """Mark that this thread runs a call on `pool`: calls that its callbacks make must not wait for it."""
    before = _thread.pools, _thread.reservations
    try:
        _thread.pools, _thread.reservations = (*before[0], pool), (*before[1], *reservations)
        yield
    finally:
        _thread.pools, _thread.reservations = before


@contextlib.contextmanager
def reserve(pool, needs: Mapping) -> Iterator[None]:
    """Run a rectangular call: wait until its blocks are free, all of them, and keep them for this thread.

    Where nobody else runs on the pool, or this call is made from inside another, there is nothing to wait for: it
    takes blocks as it needs them, past the budget if it must.

    Parameters
    ----------
    pool : KVPool
    needs : mapping of KVCacheGroup to int
        Blocks, at most.
    """
    reservation = Reservation(needs)
    undo = Undo(functools.partial(_end, pool, reservation))
    try:
        is_kept = not is_inside(pool) and _wait(pool, reservation)
        with entered(pool, *([reservation] if is_kept else [])):
            yield
    finally:
        undo.now()


def _end(pool, reservation: Reservation) -> None:
    with pool.lock:
        reservation.end(pool)


def _wait(pool, reservation: Reservation) -> bool:
    """Whether the blocks were promised; False if they are not there and nobody will free them."""
    patience = StallDetector(pool)
    while True:
        is_kept = atomically(functools.partial(_try, pool, reservation, patience))
        if is_kept is not None:
            return is_kept
        time.sleep(_PAUSE)


def _try(pool, reservation: Reservation, patience: StallDetector) -> bool | None:
    """Promise the blocks if they are free; False: no call will free them; None: look again soon."""
    with pool.lock:
        pool.waiting.add(reservation)
        if reservation.fits():
            reservation.begin(pool)
            return True
        are_packed = any(engine.is_running for engine in pool.engines)
        if patience.is_for_reserved_calls or (are_packed and not patience.is_over):
            return None
        pool.waiting.discard(reservation)
        return False
