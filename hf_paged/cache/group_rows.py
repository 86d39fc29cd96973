"""GroupRows: the rows of one cache in one attention group."""

from collections.abc import Sequence

from hf_paged.cache.append_step import AppendStep
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.memory.reservation import Reservation, keeping


class GroupRows:
    """The block tables of one attention group, one per row, and how far each layer of it has come.

    Blocks are taken and freed in atomic sections. Their content is copied outside, by the next user of the
    rows: `copy_shared`.
    """

    def __init__(self, pool: KVCacheGroup, batch_size: int):
        self.pool = pool
        self.tables = [BlockTable(pool.blocks) for _ in range(batch_size)]
        self.lengths: dict[int, int] = {}  # layer index -> positions it has seen
        self.step: AppendStep | None = None
        self.stored_metadata: tuple[tuple, AttentionMetadata] | None = None  # Of cross-attention, and its key.
        self.version = 0  # Changes so far; a handle from before the last one is stale.
        self._copies: list[tuple[int, int]] = []  # (source, destination) of shared blocks, not copied yet.
        self._held = BlockTable(pool.blocks)  # Their sources.

    @property
    def owned(self) -> list[BlockTable]:
        """Every table that owns blocks for these rows."""
        return [*self.tables, self._held]

    def make_room(self, writes: dict[int, int], last: list[int], promised: Sequence[Reservation]) -> None:
        """Private blocks for the tokens from `writes` to `last` of the rows that store some. In a section.

        Raises
        ------
        OutOfBlocksError
            If the blocks do not fit in memory; nothing is changed.
        """
        tables = [self.tables[row] for row in writes]
        ranges = [(token, last[row]) for row, token in writes.items()]
        copies = make_writable(tables, ranges, lambda count: self.pool.allocate(count, promised))
        self._held.blocks += [source for source, _ in copies]
        self._copies += copies

    @property
    def is_settled(self) -> bool:
        """Tell whether every block holds what its row has stored."""
        return not self._copies

    def copy_shared(self) -> None:
        """Copy shared blocks that a row is about to write to. Outside a section, under the pool's lock."""
        self.pool.copy_blocks(self._copies)

    def let_go(self) -> None:
        """Note that `copy_shared` has come to its end. In a section."""
        self._copies = []
        self._held.release()

    def change(self) -> None:
        """Note that the tables are about to change: a handle on them is stale."""
        self.step = None
        self.version += 1

    def select(self, rows: list[int], promised: Sequence[Reservation]) -> None:
        """Make row ``i`` what row ``rows[i]`` is now. In a section."""
        self.change()
        with keeping(self.pool, promised):
            old, self.tables = self.tables, [self.tables[row].fork() for row in rows]
            for table in old:
                table.release()

    @property
    def length(self) -> int:
        return max([0, *self.lengths.values()])

    @property
    def window(self) -> int | None:
        return self.pool.key.window
