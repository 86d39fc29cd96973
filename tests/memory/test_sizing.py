"""Sizing: the formula for the blocks of a row, against rows that really grow, and the tokens of a step by device."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_paged import PagedConfig
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.sizing import (
    PROCESS_BYTES,
    SMALL_BUDGET,
    StepLimits,
    Workspace,
    blocks_beside_steps,
    missing_beside_steps,
    row_blocks,
    step_limits,
    step_tokens,
)


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


MIB = 2**20
workspaces = st.builds(
    Workspace, st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 300_000), st.integers(0, 10**8)
)


@given(
    workspace=workspaces,
    budget=st.integers(1, 2**36),
    token_budget=st.none() | st.integers(1, 10_000),
    block=st.integers(1, 10**7),
)
def test_blocks_and_the_largest_step_fit_into_the_budget_or_it_says_by_how_much_not(
    workspace, budget, token_budget, block
):
    limits = step_limits(token_budget, budget, workspace)
    assert 1 <= limits.rows <= limits.tokens <= (token_budget or 512)
    assert token_budget is None or limits.tokens == token_budget
    blocks = blocks_beside_steps(budget, block, workspace, limits)
    if budget <= SMALL_BUDGET:
        assert blocks == max(1, budget // block) and limits.rows == limits.tokens == (token_budget or 512)
        return
    missing = missing_beside_steps(budget, workspace, limits)
    assert (blocks - 1) * block + workspace.of_step(limits) + PROCESS_BYTES <= budget + missing
    assert blocks * block <= max(SMALL_BUDGET, budget - PROCESS_BYTES) or blocks == 1


def test_a_tight_budget_makes_smaller_steps():
    """Numbers of SmolLM2 in float32."""
    workspace = Workspace(token_bytes=28_160, row_bytes=4 * 49_152, vocab_size=49_152)
    limits = [step_limits(None, mebibytes * MIB, workspace) for mebibytes in (32, 64, 256, 1024, 8192)]
    assert limits == [StepLimits(512, 512), *(StepLimits(*two) for two in [(99, 8), (397, 34), (512, 136), (512, 512)])]
    blocks = 3 * 2 * 64 * 16 * 4 * 30
    assert blocks_beside_steps(256 * MIB, blocks, workspace, limits[2]) * blocks > 180 * MIB
    assert not missing_beside_steps(256 * MIB, workspace, limits[2])
    assert missing_beside_steps(256 * MIB, workspace, step_limits(8192, 256 * MIB, workspace)) > 0
