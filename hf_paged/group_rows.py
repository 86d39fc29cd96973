"""GroupRows: the rows of one cache in one attention group."""

from .block_table import BlockTable
from .kv_pool import GroupPool
from .reservation import keeping
from .step import Reads, Step


class GroupRows:
    """The block tables of one attention group, one a row, and how far each layer of it has come."""

    def __init__(self, pool: GroupPool, batch_size: int):
        self.pool = pool
        self.tables = [BlockTable(pool.blocks) for _ in range(batch_size)]
        self.lengths: dict[int, int] = {}  # layer index -> positions it has seen
        self.step: Step | None = None
        self.stored_reads: tuple[tuple, Reads] | None = None  # Of cross-attention: what it is for, and it.
        self.version = 0  # Changes so far; a handle from before the last one is stale.

    def change(self) -> None:
        """Note that the tables are about to change: a handle on them is stale."""
        self.step = None
        self.version += 1

    def select(self, rows: list[int]) -> None:
        """Make row ``i`` what row ``rows[i]`` is now. Called under the pool's lock."""
        self.change()
        with keeping(self.pool):
            old, self.tables = self.tables, [self.tables[row].fork() for row in rows]
            for table in old:
                table.release()

    @property
    def length(self) -> int:
        return max([0, *self.lengths.values()])

    @property
    def window(self) -> int | None:
        return self.pool.key.window
