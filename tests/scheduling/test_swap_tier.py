"""The swap space in the plan of a step: what is spilled and restored, who waits for it, and what a failure leaves."""

from types import SimpleNamespace

import pytest

from hf_paged.errors import OutOfBlocksError
from hf_paged.scheduling.scheduler import SchedulerOutput
from hf_paged.scheduling.swap_tier import SwapTier
from support.fake_groups import FakeGroup, Rows


def rows_with_swap(*groups, swap_blocks=20, budget=64):
    costs = SimpleNamespace(spilling_pays=True, restoring_pays=True)
    return Rows(*groups, budget=budget, tier=SwapTier([swap_blocks] * len(groups), costs))


def evicted(num_blocks=8, **options):
    """Rows on a pool of so many blocks whose two rows of 12 tokens were spilled, by one of 31."""
    rows = rows_with_swap(FakeGroup(num_blocks), **options)
    rows.run(range(13)), rows.run(range(20, 33)), rows.run(range(40, 71))
    assert rows.prefix.tier.counts.spilled == 6
    return rows


def plan(rows, tokens):
    request = rows.arrive(tokens)
    return request, rows.scheduler.schedule()


def test_a_row_finds_what_was_spilled_and_the_pool_finds_it_afterwards():
    rows = evicted()
    row, step = plan(rows, range(13))
    assert [(chunk.start, chunk.end) for chunk in step.chunks] == [(12, 13)]
    [restores], tier = step.restores, rows.prefix.tier
    assert [block for _, block in restores] == row.tables[0].blocks[:3] and tier.pools[0].used_blocks >= 3
    rows.scheduler.commit(step)
    rows.scheduler.remove(row)
    rows.prefix.check_integrity()
    assert (tier.counts.restored, tier.pools[0].used_blocks) == (3, 0)
    row, step = plan(rows, range(13))
    assert step.chunks[0].start == 12 and not any(step.restores), "they are in the pool"


def test_a_block_that_is_in_the_swap_space_is_not_spilled_again():
    rows, spilled = evicted(), []
    for _ in range(3):
        rows.run(range(13)), rows.run(range(20, 33)), rows.run(range(40, 71))
        spilled.append(rows.prefix.tier.counts.spilled)
    assert spilled == [12] * 3 and rows.groups[0].blocks.num_evictions > 30


def test_what_is_spilled_is_found_when_the_step_is_committed_and_not_if_it_is_aborted():
    for is_done in (True, False):
        rows = rows_with_swap(FakeGroup(8))
        rows.run(range(13))
        row, step = plan(rows, range(40, 71))
        assert [block for block, _ in step.spills[0]] and rows.prefix.tier.pools[0].used_blocks
        (rows.scheduler.commit if is_done else rows.scheduler.abort)(step)
        rows.scheduler.remove(row)
        rows.prefix.check_integrity()
        counts = rows.prefix.tier.pools[0]
        assert counts.used_blocks == 0 and bool(counts.cached_blocks) is is_done
        assert rows.run(range(13)) == (12 if is_done else 0)


def test_a_row_whose_blocks_were_not_restored_runs_its_tokens():
    rows = evicted()
    row, step = plan(rows, range(13))
    assert any(step.restores)
    rows.scheduler.abort(step)
    rows.prefix.check_integrity()
    assert row.num_stored == 0 and not row.tables[0].blocks and row.num_preemptions == 1
    step = rows.scheduler.schedule()
    assert step.chunks[0].start == 12, "they are in the swap space still"
    rows.scheduler.lose(SchedulerOutput(step.chunks, step.copies, []))
    rows.prefix.stop_swapping()
    rows.scheduler.commit(SchedulerOutput([], step.copies, []))
    assert rows.step() == [(row, 0, 13)], "the swap space is gone"


def test_rows_wait_a_step_for_what_another_one_restores_or_spills():
    rows = evicted()
    first, second = rows.arrive(range(13)), rows.arrive([*range(12), 99])
    assert rows.step() == [(first, 12, 13)]
    assert rows.step() == [(second, 12, 13)]
    assert rows.prefix.tier.counts.restored == 3

    rows = rows_with_swap(FakeGroup(24))
    rows.groups[0].blocks.cache_blocks = 0  # Evicts though there is room.
    rows.run(range(13))
    other, again = rows.arrive(range(40, 75)), rows.arrive(range(13))
    step = rows.scheduler.schedule()
    assert len(step.spills[0]) == 3 and [chunk.request for chunk in step.chunks] == [other]
    rows.scheduler.commit(step)
    rows.scheduler.remove(other)
    assert rows.step() == [(again, 12, 13)]


def test_a_row_that_lacks_blocks_to_restore_into_takes_what_is_in_the_pool(monkeypatch):
    rows = evicted()
    pool, allocate = rows.groups[0].blocks, rows.groups[0].blocks.allocate

    def refuse(count):
        monkeypatch.setattr(pool, "allocate", allocate)
        raise OutOfBlocksError(count, 0, 8)

    monkeypatch.setattr(pool, "allocate", refuse)
    assert rows.run(range(13)) == 0
    assert rows.prefix.tier.pools[0].used_blocks == 0 and rows.prefix.tier.counts.restored == 0


def test_a_tier_gives_up_the_deepest_block_of_the_row_used_longest_ago():
    rows = evicted(swap_blocks=6)
    assert rows.run(range(13)) == 12
    rows.run(range(40, 71)), rows.run(range(80, 111))
    assert rows.prefix.tier.counts.spilled > 6
    rows.prefix.check_integrity()


def test_windows_restore_what_is_seen():
    rows = rows_with_swap(FakeGroup(12), FakeGroup(12, window=5))
    rows.run(range(22))
    rows.run(range(40, 85))
    row, step = plan(rows, range(22))
    assert [chunk.start for chunk in step.chunks] == [20]
    assert [len(restores) for restores in step.restores] == [5, 1]
    rows.scheduler.commit(step)
    rows.scheduler.remove(row)
    rows.prefix.check_integrity()


@pytest.mark.parametrize("what", ["spilling_pays", "restoring_pays"])
def test_nothing_moves_that_does_not_pay(what):
    rows = evicted()
    setattr(rows.prefix.tier.costs, what, False)
    spilled = rows.prefix.tier.counts.spilled
    found = rows.run(range(13)), rows.run(range(40, 71))
    assert found[0] == (12 if what == "spilling_pays" else 0)
    assert (rows.prefix.tier.counts.spilled == spilled) is (what == "spilling_pays")


def test_an_error_while_a_step_is_planned_leaves_nothing_moving(monkeypatch):
    rows = evicted()
    row = rows.arrive(range(13))
    monkeypatch.setattr(rows.scheduler, "_run", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows.scheduler.schedule()
    monkeypatch.undo()
    rows.prefix.check_integrity()
    assert rows.prefix.tier.pools[0].used_blocks == rows.groups[0].blocks.used_blocks == 0
    assert rows.step() == [(row, 12, 13)]
