"""BlockPool and BlockTable: their contracts, and a stateful comparison with a plain dictionary."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from hf_paged.errors import BlockError, OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.eviction import LeastRecentlyUsed
from support.fake_groups import WatchedPool
from support.policies import AnyBlock, MostRecentlyUsed


def write(tables, ranges, pool):
    """Make room and free what was copied; the copies."""
    copies = make_writable(tables, ranges, pool.allocate)
    pool.free(source for source, _ in copies)
    return copies


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4, 4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocksError, match=r"needs 2 blocks, 1 of 4 are free: lower the batch .* memory_budget"):
        pool.allocate(2)
    assert (pool.free_blocks, pool.used_blocks) == (1, 3)


def test_double_free_raises():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(BlockError, match="freed twice"):
        pool.free(blocks)


def test_use_after_free_raises():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(BlockError, match="is free: what it held is lost"):
        pool.touch(blocks)


def test_a_shared_block_lives_until_its_last_owner_frees_it():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.touch(blocks)
    pool.free(blocks)
    assert pool.used_blocks == 1
    pool.free(blocks)
    assert pool.used_blocks == 0


def test_cached_blocks_are_evicted_least_recently_used_first():
    pool = BlockPool(3, 4)
    a, b, c = pool.allocate(3)
    evicted = []
    for block in (a, b):
        pool.keep(block, evicted.append)
    pool.free([b, a])
    assert (pool.free_blocks, pool.cached_blocks, pool.used_blocks) == (0, 2, 1)
    assert pool.allocate(1) == evicted == [b]
    pool.touch([a])
    assert pool.used_blocks == 3 and c not in (a, b) and pool.num_evictions == 1


def test_free_blocks_go_before_cached_ones():
    pool = BlockPool(3, 4)
    a, b = pool.allocate(2)
    pool.keep(a, pytest.fail)
    pool.free([a, b])
    assert a not in pool.allocate(2)


def test_more_cached_blocks_than_their_share_go_before_fresh_ones():
    pool, evicted = BlockPool(100, 4, cache_blocks=3), []

    def run_a_row(num_blocks):
        blocks = pool.allocate(num_blocks)
        for block in blocks:
            pool.keep(block, evicted.append)
        pool.free(blocks)
        return blocks

    first = [run_a_row(1)[0] for _ in range(4)]
    assert (pool.cached_blocks, pool.high_water, evicted) == (4, 4, [])
    assert run_a_row(1) == evicted == first[:1], "the fifth row takes the block of the first"
    for _ in range(50):
        run_a_row(2)
    assert (pool.cached_blocks, pool.high_water) == (5, 5), "rows that share nothing take memory for ever"
    assert len(pool.allocate(90)) == 90, "the share must not keep rows from the rest"


def test_what_is_evicted_by_name_is_free():
    pool = BlockPool(2, 4)
    cached, used = pool.allocate(2)
    evicted = []
    for block in (cached, used):
        pool.keep(block, evicted.append)
    with pytest.raises(BlockError, match="kept already"):
        pool.keep(used, evicted.append)
    pool.free([cached])
    with pytest.raises(BlockError, match="not in use"):
        pool.keep(cached, evicted.append)
    pool.evict(cached), pool.evict(used)
    assert evicted == [cached, used] and (pool.free_blocks, pool.used_blocks) == (1, 1)
    pool.free([used])
    assert pool.free_blocks == 2 and pool.num_evictions == 0


def test_a_kept_block_that_is_written_again_is_forgotten():
    pool = BlockPool(8, 4)
    table, evicted = BlockTable(pool), []
    write([table], [(0, 8)], pool)
    first, second = table.blocks
    for block in table.blocks:
        pool.keep(block, evicted.append)
    sharer = table.fork()
    table.truncate(6)
    assert write([table], [(6, 8)], pool) == [(second, table.blocks[1])]
    assert evicted == [], "the other row still has what was kept"
    sharer.truncate(2)
    table.release()
    write([sharer], [(2, 4)], pool)
    assert evicted == [first]
    sharer.release()
    assert pool.cached_blocks == 1 and pool.is_kept(second)


def test_vacated_blocks_come_after_all_that_have_memory_the_lowest_first():
    pool = BlockPool(6, 4)
    blocks = pool.allocate(5)
    pool.free(blocks[::-1])  # 0 is freed last.
    assert pool.vacate(2) == [2, 3, 4]
    assert (pool.free_blocks, pool.fresh_blocks, pool.high_water) == (6, 4, 5)
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]


def test_vacated_blocks_are_not_taken_for_more_cached_blocks_than_their_share():
    pool, evicted = BlockPool(4, 4, cache_blocks=0), []
    cached, free = pool.allocate(2)
    pool.keep(cached, evicted.append)
    pool.free([cached, free])
    pool.vacate(0)
    assert pool.allocate(1) == evicted == [cached]


def test_a_pool_shrinks_by_blocks_that_were_never_handed_out():
    pool = BlockPool(10, 4)
    pool.free(pool.allocate(4))
    pool.shrink(3)
    assert (pool.total_blocks, pool.free_blocks) == (7, 7)
    pool.shrink(100)
    assert (pool.total_blocks, pool.free_blocks) == (4, 4)
    untouched = BlockPool(3, 4)
    untouched.shrink(3)
    assert untouched.total_blocks == 1, "a pool has a block"
    pool.check_integrity([])


def test_give_back_is_seen_by_the_next_call():
    pool = BlockPool(2, 4)
    pool.give_back(pool.allocate(2))
    assert pool.free_blocks == 2


def test_integrity_check_finds_a_leak_and_a_stranger():
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    pool.check_integrity([blocks])
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity([blocks[:1]])
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity([blocks, blocks[:1]])


def test_copy_on_write_spares_the_last_owner():
    pool = BlockPool(8, 4)
    first = BlockTable(pool)
    write([first], [(0, 6)], pool)
    second, third = first.fork(), first.fork()
    tables = [first, second, third]
    copies = write(tables, [(6, 7)] * 3, pool)
    assert len(copies) == 2, "three owners of one block need two copies"
    assert len({table.blocks[1] for table in tables}) == 3
    assert len({table.blocks[0] for table in tables}) == 1, "full blocks stay shared"
    pool.check_integrity(table.blocks for table in tables)


def test_a_window_frees_whole_blocks_only():
    pool = BlockPool(8, 4)
    table = BlockTable(pool)
    write([table], [(0, 11)], pool)
    table.evict_before(7)
    assert (table.base, len(table.blocks), pool.used_blocks) == (4, 2, 2)
    assert table.slots(7, 9) == [table.blocks[0] * 4 + 3, table.blocks[1] * 4]


class TablesAgainstDictionaries(RuleBasedStateMachine):
    """Rows grow, fork, shrink, slide and end; the model is a dictionary of token lists a row.

    A token is written into a fake memory at its slot; reading a row back must give its own tokens, so a
    missed copy-on-write or a block in two hands shows at once.
    """

    rows = Bundle("rows")
    BLOCK, TOTAL = 4, 24

    def __init__(self):
        super().__init__()
        self.memory: dict[int, int] = {}
        self.tables: dict[int, BlockTable] = {}
        self.model: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}  # Tokens of kept blocks.
        self.next_row = self.next_token = 0

    def _add(self, table, tokens):
        self.next_row += 1
        self.tables[self.next_row], self.model[self.next_row] = table, tokens
        return self.next_row

    @initialize(
        target=rows,
        cache_blocks=st.integers(0, TOTAL),
        policy=st.sampled_from([LeastRecentlyUsed, MostRecentlyUsed, AnyBlock]),
    )
    def first_row(self, cache_blocks, policy):
        # Watches what an allocation evicts, and what is fresh.
        self.pool = WatchedPool(self.TOTAL, self.BLOCK, cache_blocks, policy())
        return self.start()

    @rule(target=rows)
    def start(self):
        return self._add(BlockTable(self.pool), [])

    @rule(targets=(rows,), row=rows)
    def fork(self, row):
        return self._add(self.tables[row].fork(), list(self.model[row]))

    @rule(chosen=st.lists(rows, min_size=1, max_size=4, unique=True), count=st.integers(1, 9))
    def append(self, chosen, count):
        tables = [self.tables[row] for row in chosen]
        before = [(list(t.blocks), t.num_tokens) for t in tables], self.pool.free_blocks
        ranges = [(len(self.model[row]), len(self.model[row]) + count) for row in chosen]
        try:
            copies = write(tables, ranges, self.pool)
        except OutOfBlocksError as error:
            assert error.needed > error.free
            assert before == ([(list(t.blocks), t.num_tokens) for t in tables], self.pool.free_blocks)
            return
        for source, destination in copies:
            for offset in range(self.BLOCK):
                self.memory[destination * self.BLOCK + offset] = self.memory.get(source * self.BLOCK + offset, -1)
        for row, (start, end) in zip(chosen, ranges):
            for slot in self.tables[row].slots(start, end):
                self.next_token += 1
                self.memory[slot] = self.next_token
                self.model[row].append(self.next_token)

    @rule(row=rows, removed=st.integers(0, 12))
    def truncate(self, row, removed):
        keep = max(self.tables[row].base, len(self.model[row]) - removed)
        self.tables[row].truncate(keep)
        del self.model[row][keep:]

    @rule(row=rows, window=st.integers(0, 10))
    def slide(self, row, window):
        self.tables[row].evict_before(max(0, len(self.model[row]) - window))

    @rule(row=consumes(rows))
    def end(self, row):
        self.tables.pop(row).release()
        del self.model[row]

    @rule(row=consumes(rows))
    def die_unseen(self, row):
        self.pool.give_back(self.tables.pop(row).blocks)
        del self.model[row]

    @rule(row=rows)
    def keep(self, row):
        """Rows that start like this one may have its full blocks, as they are now."""
        table, tokens = self.tables[row], self.model[row]
        for index, block in enumerate(table.blocks):
            start = table.base + index * self.BLOCK
            if start + self.BLOCK <= len(tokens) and block not in self.kept:
                self.pool.keep(block, self.kept.pop)
                self.kept[block] = tokens[start : start + self.BLOCK]

    @precondition(lambda self: self.kept)
    @rule(target=rows, pick=st.integers(0, 10**6))
    def reuse(self, pick):
        block, tokens = list(self.kept.items())[pick % len(self.kept)]
        table = BlockTable(self.pool)
        table.reuse([block], self.BLOCK)
        return self._add(table, list(tokens))

    @precondition(lambda self: self.kept)
    @rule(pick=st.integers(0, 10**6))
    def evict(self, pick):
        block = list(self.kept)[pick % len(self.kept)]
        self.pool.evict(block)
        assert block not in self.kept

    @rule(num_blocks=st.integers(0, TOTAL))
    def evict_down_to(self, num_blocks):
        before = self.pool.cached_blocks
        self.pool.evict_down_to(num_blocks)
        assert self.pool.cached_blocks == min(before, num_blocks)

    @rule(num_left=st.integers(0, TOTAL))
    def vacate(self, num_left):
        """The memory of free blocks is gone, and with it what they held."""
        before = self.pool.free_blocks - self.pool.fresh_blocks
        vacated = self.pool.vacate(num_left)
        assert vacated == sorted(vacated) and len(vacated) == max(0, before - num_left)
        assert self.pool.free_blocks - self.pool.fresh_blocks == min(before, num_left)
        for block in vacated:
            for offset in range(self.BLOCK):
                self.memory.pop(block * self.BLOCK + offset, None)

    @invariant()
    def rows_read_back(self):
        for row, tokens in self.model.items():
            table = self.tables[row]
            stored = tokens[table.base :]
            assert [self.memory[slot] for slot in table.slots(table.base, len(tokens))] == stored

    @invariant()
    def kept_blocks_hold_what_they_held(self):
        for block, tokens in self.kept.items():
            assert self.pool.is_kept(block)
            assert [self.memory[block * self.BLOCK + at] for at in range(self.BLOCK)] == tokens
        assert self.pool.cached_blocks <= len(self.kept)

    @invariant()
    def pool_is_whole(self):
        self.pool.check_integrity(table.blocks for table in self.tables.values())
        assert self.pool.free_blocks + self.pool.cached_blocks + self.pool.used_blocks == self.TOTAL


TestTablesAgainstDictionaries = TablesAgainstDictionaries.TestCase
TestTablesAgainstDictionaries.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
