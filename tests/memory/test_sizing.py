"""Sizing: the formula for the blocks of a row, against rows that really grow, and the tokens of a step by device."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_paged import PagedConfig
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.sizing import row_blocks, step_tokens


def run_chunk(table, pool, end, window):
    """Make room for the tokens up to `end`, as a forward needs it; the blocks that the row owns then."""
    start = table.num_tokens
    if window is not None:
        table.evict_before(start - (window - 1))
    make_writable([table], [(start, end)], pool.allocate)
    return len(table.blocks)


def most_blocks(tokens, block_size, window, chunk):
    """The most blocks of all rows that reach some token one by one and then run one chunk, as long as may be."""
    pool, most = BlockPool(4 * (tokens + 1), block_size), 0
    for start in range(tokens):
        table = BlockTable(pool)
        for end in range(1, start + 1):
            run_chunk(table, pool, end, window)
        most = max(most, run_chunk(table, pool, min(start + chunk, tokens), window))
        table.release()
    return most


@given(
    tokens=st.integers(1, 40),
    block_size=st.integers(1, 8),
    window=st.none() | st.integers(1, 24),
    chunk=st.integers(1, 12),
)
def test_the_formula_says_what_the_worst_row_owns(tokens, block_size, window, chunk):
    assert row_blocks(tokens, block_size, window, chunk) == most_blocks(tokens, block_size, window, chunk)


@given(
    block_size=st.integers(1, 8),
    window=st.none() | st.integers(1, 24),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
def test_no_division_into_chunks_needs_more(block_size, window, lengths):
    pool = BlockPool(100, block_size)
    table = BlockTable(pool)
    limit = row_blocks(sum(lengths), block_size, window, max(lengths))
    for length in lengths:
        assert run_chunk(table, pool, table.num_tokens + length, window) <= limit


def test_a_window_one_longer_than_blocks_touches_one_block_less():
    """Block 4: a window of 5 tokens begins in a block's last slot at worst, and ends with the next block."""
    assert [row_blocks(100, 4, window) for window in (4, 5, 6, 8, 9)] == [2, 2, 3, 3, 3]


def test_a_step_runs_more_tokens_on_a_gpu_unless_it_is_told():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert [step_tokens(PagedConfig(), device) for device in (cpu, gpu)] == [512, 4096]
    assert [step_tokens(PagedConfig(token_budget=64), device) for device in (cpu, gpu)] == [64, 64]
