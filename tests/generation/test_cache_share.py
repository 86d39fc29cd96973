"""Prompts that share nothing stop taking memory; what is read again and fits the share is found again."""

import random

import pytest

import hf_paged
from hf_paged import PagedConfig
from hf_paged.models import registry
from support import zoo
from support.fake_groups import FakeGroup, Rows
from support.packing import BLOCK, pair
from support.parity import assert_rows_equal


def distinct_rows(count: int, length: int):
    """Rows whose tokens are in no other row."""
    return (range(1000 + index * length, 1000 + (index + 1) * length) for index in range(count))


def test_a_working_set_within_the_share_is_found_again():
    rows = Rows(group := FakeGroup(400))
    group.blocks.cache_blocks = 50
    hot = [list(range(100 * index, 100 * index + 20)) for index in range(4)]  # 20 blocks with one more token each.
    for tokens in hot:
        rows.run(tokens)
    for number, cold in enumerate(distinct_rows(300, 20)):
        rows.run(cold)
        assert rows.run(hot[number % len(hot)]) == 16
    assert group.blocks.high_water <= 50 + 2 * 5, "a row that runs, and the share"


def test_the_rest_of_the_budget_is_for_rows_that_run():
    rows = Rows(group := FakeGroup(400), budget=2000)
    group.blocks.cache_blocks = 50
    cold = distinct_rows(130, 40)
    for _ in range(100):
        rows.run(next(cold))
    assert group.blocks.high_water <= 50 + 2 * 10
    for tokens in cold:
        rows.arrive(tokens)
    assert len(rows.step()) == 30 and group.blocks.high_water == 300 + 50, "they have the rest"


@pytest.mark.parametrize("share, most", [(0.125, 100), (0.5, 400), (1.0, 800)])
def test_distinct_prompts_of_a_model(share, most):
    dense, paged = pair()
    config = PagedConfig(block_size=4, memory_budget=800 * BLOCK, prefix_cache_share=share)
    hf_paged.configure(paged, config)
    random.seed(0)
    for seed in range(20):
        inputs = zoo.prompts([random.randint(20, 40) for _ in range(8)], seed)
        got = paged.generate(**inputs, max_new_tokens=2, pad_token_id=0)
        if seed % 10 == 9:
            assert_rows_equal(dense, inputs, dense.generate(**inputs, max_new_tokens=2, pad_token_id=0), got)
    (group,) = registry.pools_under(paged)[0].groups.values()
    running = 8 * (-(-42 // 4))
    assert most - running < group.blocks.high_water <= min(800, most + running)
    assert hf_paged.stats(paged).packed_calls == 20
