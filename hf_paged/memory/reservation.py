"""Reservations: blocks that a call through transformers' own loop will need, promised to it at entry. No tensors here.

Packed rows queue and can be preempted, one by one. Beams, assisted decoding and fallbacks run transformers' own loop
and hold the blocks of all their rows to their end. So such a call comes in when all of these are free, or when no
other call is left that could free them.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hf_paged.atomic import Undo, atomically
from hf_paged.memory.stall_detector import StallDetector

if TYPE_CHECKING:
    from hf_paged.memory.kv_pool import KVCacheGroup, KVPool

_PAUSE = 0.005  # Seconds between two looks at the pool.


class Reservation:
    """Blocks that others may not take, by KV cache group. Changed in atomic sections, under the pool's lock.

    Parameters
    ----------
    needs : mapping of KVCacheGroup to int
        Blocks that the call holds at most, at any time.
    """

    def __init__(self, needs: "Mapping[KVCacheGroup, int]"):
        self._needs, self._left = dict(needs), dict.fromkeys(needs, 0)
        self._thread = threading.get_ident()

    @property
    def is_of_this_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def fits(self) -> bool:
        """Tell whether all the blocks can be promised now."""
        return all(group.blocks.spare_blocks >= count for group, count in self._needs.items())

    def begin(self, pool: "KVPool") -> None:
        """Promise the blocks."""
        for group, count in self._needs.items():
            group.blocks.reserved += count
            self._left[group] = count
        pool.waiting.discard(self)
        pool.reservations.append(self)

    def spend(self, group: "KVCacheGroup", num_blocks: int) -> None:
        """Turn promised blocks of `group` into ones that the call may allocate now, as far as they go."""
        spent = min(num_blocks, self._left.get(group, 0))
        if spent:
            self._left[group] -= spent
            group.blocks.reserved -= spent

    def put_back(self, group: "KVCacheGroup", num_blocks: int) -> None:
        """Promise blocks again that the call has freed: it will want as many later."""
        left = self._left.get(group, 0)
        back = min(num_blocks, self._needs.get(group, 0) - left)
        if back > 0:
            self._left[group] = left + back
            group.blocks.reserved += back

    def end(self, pool: "KVPool") -> None:
        """Take back what is left of the promise. Idempotent."""
        pool.waiting.discard(self)
        if self not in pool.reservations:
            return
        for group, count in self._left.items():
            group.blocks.reserved -= count
        self._needs.clear()
        self._left.clear()
        pool.reservations.remove(self)
        pool.last_reserved = time.monotonic()


class _ThreadState(threading.local):
    pools: "tuple[KVPool, ...]" = ()  # On which this thread runs calls, outermost first.
    reservations: tuple[Reservation, ...] = ()


_thread = _ThreadState()


def of_this_thread() -> tuple[Reservation, ...]:
    """The reservations of the calls that run on this thread."""
    return _thread.reservations


@contextlib.contextmanager
def keeping(group: "KVCacheGroup", reservations: Sequence[Reservation]) -> Iterator[None]:
    """Promise the blocks that a call frees inside to it again. Entered under the pool's lock.

    Parameters
    ----------
    group : KVCacheGroup
    reservations : sequence of Reservation
        The call's.
    """
    spare = group.blocks.spare_blocks
    yield
    freed = group.blocks.spare_blocks - spare
    for reservation in reservations:
        reservation.put_back(group, freed)


def is_inside(pool: "KVPool") -> bool:
    """Tell whether this thread runs a call on `pool` already, which waits for what it does now."""
    return any(other is pool for other in _thread.pools)


@contextlib.contextmanager
def entered(pool: "KVPool", *reservations: Reservation) -> Iterator[None]:
    """Mark that this thread runs a call on `pool`: calls that its callbacks make must not wait for it."""
    before = _thread.pools, _thread.reservations
    try:
        _thread.pools, _thread.reservations = (*before[0], pool), (*before[1], *reservations)
        yield
    finally:
        _thread.pools, _thread.reservations = before


@contextlib.contextmanager
def reserve(pool: "KVPool", needs: "Mapping[KVCacheGroup, int]") -> Iterator[None]:
    """Run a call through transformers' own loop: wait until all its blocks are free, and keep them for this thread.

    Where no other call runs on the pool, or this call is made from inside another, there is nothing to wait for: it
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


def _end(pool: "KVPool", reservation: Reservation) -> None:
    with pool.lock:
        reservation.end(pool)


def _wait(pool: "KVPool", reservation: Reservation) -> bool:
    """Wait until the blocks are promised; False if they are not there and no call will free them."""
    stall_detector = StallDetector(pool)
    while True:
        is_kept = atomically(functools.partial(_try, pool, reservation, stall_detector))
        if is_kept is not None:
            return is_kept
        time.sleep(_PAUSE)


def _try(pool: "KVPool", reservation: Reservation, stall_detector: StallDetector) -> bool | None:
    """Promise the blocks if they are free; False: no call will free them; None: look again soon."""
    with pool.lock:
        pool.waiting.add(reservation)
        if reservation.fits():
            reservation.begin(pool)
            return True
        are_packed = any(engine.is_running for engine in pool.engines)
        if stall_detector.expects_blocks() or (are_packed and not stall_detector.is_stalled()):
            return None
        pool.waiting.discard(reservation)
        return False
