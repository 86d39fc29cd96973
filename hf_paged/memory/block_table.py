"""BlockTable: where the tokens of one row lie. No tensors here."""

from collections import Counter
from collections.abc import Callable, Sequence

from hf_paged.memory.block_pool import BlockPool


class BlockTable:
    """The blocks of one row in one KV cache group, in token order.

    Token ``t`` of the row lies in slot ``t % block_size`` of block ``blocks[(t - base) // block_size]``.
    Tokens before `base` are gone: they left the sliding window, or were never stored.

    The table owns one reference to each of its blocks. Rows share blocks after `fork`; a shared block
    is never written: `make_writable` copies it first (copy-on-write).

    Parameters
    ----------
    pool : BlockPool
        Owner of the ids.

    Attributes
    ----------
    num_edits : int
        How often `blocks` changed other than by blocks at its end: who copied it when there were as many lacks
        those alone.
    """

    __slots__ = ("pool", "blocks", "base", "num_tokens", "num_edits")

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.blocks: list[int] = []
        self.base = 0
        self.num_tokens = 0
        self.num_edits = 0

    def fork(self) -> "BlockTable":
        """A second table over the same blocks."""
        self.pool.touch(self.blocks)
        table = BlockTable(self.pool)
        table.blocks, table.base, table.num_tokens = list(self.blocks), self.base, self.num_tokens
        return table

    def reuse(self, blocks: list[int], num_tokens: int) -> None:
        """Let an empty table, once it starts where they do, own cached or used `blocks` up to token `num_tokens`."""
        self.pool.touch(blocks)
        self.adopt(blocks, num_tokens)

    def adopt(self, blocks: list[int], num_tokens: int) -> None:
        """As `reuse`, of blocks that the caller owns: his references are the table's now."""
        assert not self.blocks and self.base + len(blocks) * self.pool.block_size == num_tokens
        self.blocks, self.num_tokens = list(blocks), num_tokens
        self.num_edits += 1

    def start_at(self, token: int) -> None:
        """Let an empty table begin with the block that holds `token`; earlier tokens are never stored."""
        assert not self.blocks, "only an empty table can start late"
        self.base = self.num_tokens = token - token % self.pool.block_size

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens and free the blocks that none of them needs."""
        num_tokens = max(num_tokens, self.base)
        keep = _ceil_div(num_tokens - self.base, self.pool.block_size)
        self.pool.free(reversed(self.blocks[keep:]))
        del self.blocks[keep:]
        self.num_edits += 1
        self.num_tokens = min(self.num_tokens, num_tokens)

    def evict_before(self, token: int) -> None:
        """Free the leading blocks all of whose tokens come before `token`."""
        count = min((token - self.base) // self.pool.block_size, len(self.blocks))
        if count > 0:
            self.pool.free(reversed(self.blocks[:count]))
            del self.blocks[:count]
            self.base += count * self.pool.block_size
            self.num_edits += 1

    def release(self) -> None:
        """Free every block; the table is as new."""
        # Deepest first: a cached block is of use only while those before it are there, too.
        self.pool.free(reversed(self.blocks))
        self.blocks, self.base, self.num_tokens = [], 0, 0
        self.num_edits += 1

    def slots(self, start: int, end: int) -> list[int]:
        """Slot (``block * block_size + offset``) of each token in ``start .. end - 1``."""
        size, base, blocks = self.pool.block_size, self.base, self.blocks
        return [blocks[(t - base) // size] * size + t % size for t in range(start, end)]


def make_writable(
    tables: Sequence[BlockTable],
    ranges: Sequence[tuple[int, int]],
    allocate: Callable[[int], list[int]],
) -> list[tuple[int, int]]:
    """Give each table private blocks for the tokens of its range: all tables or none.

    Parameters
    ----------
    tables : sequence of BlockTable
        Tables of one pool. Extended in place; shared blocks inside a range are replaced by new ones.
    ranges : sequence of (start, end)
        For each table the tokens about to be written. ``end`` becomes its length if it is longer.
    allocate : callable
        ``allocate(n)`` returns `n` new blocks or raises and leaves everything as it was.

    Returns
    -------
    list of (source, destination)
        Blocks whose content must be copied before anything is written. The tables' references to the sources are the
        caller's now: free them when they are copied.
    """
    given_up: Counter[int] = Counter()
    shared: list[list[int]] = []
    missing: list[int] = []
    overwritten: list[tuple[BlockPool, int]] = []
    for table, (start, end) in zip(tables, ranges, strict=True):
        shared.append([])
        missing.append(0)
        if end <= start:
            continue
        assert start >= table.base, "a token that left the window cannot be written"
        size = table.pool.block_size
        last = _ceil_div(end - table.base, size)
        missing[-1] = max(0, last - len(table.blocks))
        for index in range((start - table.base) // size, min(last, len(table.blocks))):
            block = table.blocks[index]
            # The last owner keeps the block: it needs no copy once the others have left.
            if table.pool.is_shared(block, but=given_up[block]):
                given_up[block] += 1
                shared[-1].append(index)
            elif table.pool.is_kept(block):
                overwritten.append((table.pool, block))
    fresh = allocate(sum(map(len, shared)) + sum(missing))
    for pool, block in overwritten:  # Its content will not be what it was kept for.
        pool.evict(block)
    copies = []
    for table, (_, end), indices, num_missing in zip(tables, ranges, shared, missing, strict=True):
        for index in indices:
            source, table.blocks[index] = table.blocks[index], fresh.pop()
            copies.append((source, table.blocks[index]))
        table.num_edits += bool(indices)
        table.blocks.extend(fresh.pop() for _ in range(num_missing))
        table.num_tokens = max(table.num_tokens, end)
    return copies


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
