"""StallDetector: how long it is worth waiting for the blocks that the calls on a pool hold."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.memory.kv_pool import KVPool

_PATIENCE = 10.0  # Seconds without a read of the pool's pages, after which its calls count as stalled.
_LINGER = 0.1  # Seconds that the cache of a call may outlive its loop, inside ``generate``.


class StallDetector:
    """Watches the reads of a pool's pages for one waiter. Used under the pool's lock.

    Parameters
    ----------
    pool : KVPool
    """

    def __init__(self, pool: "KVPool"):
        self._pool = pool
        self._seen: int | None = None  # Reads so far, as last looked at.
        self._since = 0.0  # When they were first seen at that number.

    def is_stalled(self) -> bool:
        """Tell whether no page was read for long, as far as was looked: the calls that run do not come on."""
        if self._pool.page_reads != self._seen:
            self._seen, self._since = self._pool.page_reads, time.monotonic()
        return time.monotonic() - self._since > _PATIENCE

    def expects_blocks(self) -> bool:
        """Tell whether calls with a reservation run and come on, or one has just ended: blocks will be free soon."""
        just_ended = time.monotonic() - self._pool.last_reserved < _LINGER
        return (bool(self._pool.reservations) or just_ended) and not self.is_stalled()
