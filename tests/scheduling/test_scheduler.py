"""Scheduler: its promises one by one. `test_scheduler_fuzz.py` drives it at random."""

import pytest

from hf_paged.errors import OutOfBlocksError
from hf_paged.scheduling.request import Request, RequestState
from hf_paged.scheduling.scheduler import Scheduler
from support.fake_groups import FakeGroup


def make(*groups, budget=64):
    """A scheduler over fake groups; with the function that queues a prompt of some length, and its duplicates."""
    scheduler = Scheduler(groups, budget)

    def arrive(length, duplicates=0):
        requests = [Request(list(range(length)), [group.blocks for group in groups]) for _ in range(1 + duplicates)]
        requests[0].duplicates = requests[1:]
        scheduler.add(requests[0])
        return requests if duplicates else requests[0]

    return scheduler, arrive


def run(scheduler, sampled=True, **options):
    """One step; with `sampled` its rows get their next tokens at once. Returns the (row, start, end) and the step."""
    step = scheduler.schedule(**options)
    samples = [chunk.request for chunk in step.chunks if chunk.samples]
    scheduler.commit(step)
    for request in samples:
        duplicates = request.duplicates
        scheduler.start_duplicates(request)
        for row in (request, *duplicates) if sampled else ():
            row.tokens.append(7)
    return [(chunk.request, chunk.start, chunk.end) for chunk in step.chunks], step


def test_a_step_mixes_decode_tokens_and_chunks_under_its_budget():
    scheduler, arrive = make(FakeGroup(32), budget=8)
    first, second, third = arrive(6), arrive(10), arrive(3)
    assert run(scheduler)[0] == [(first, 0, 6), (second, 0, 2)]
    assert run(scheduler)[0] == [(first, 6, 7), (second, 2, 9)]
    assert run(scheduler)[0] == [(first, 7, 8), (second, 9, 10), (third, 0, 3)]


def test_a_row_being_sampled_sits_the_step_out():
    scheduler, arrive = make(FakeGroup(32))
    row = arrive(4)
    run(scheduler, sampled=False)
    assert run(scheduler)[0] == [] and row.state is RequestState.RUNNING
    row.tokens.append(7)
    assert run(scheduler)[0] == [(row, 4, 5)]


def test_the_row_that_came_last_is_preempted_and_comes_back():
    group = FakeGroup(4)
    scheduler, arrive = make(group)
    first, last = arrive(7), arrive(7)
    run(scheduler), run(scheduler)
    assert run(scheduler)[0] == [(first, 8, 9)], "the fifth block is the last row's"
    assert (last.state, last.num_stored, last.tables[0].blocks) == (RequestState.WAITING, 0, [])
    assert (len(last.tokens), last.num_preemptions, scheduler.num_preemptions) == (9, 1, 1)
    later = arrive(1)
    assert run(scheduler)[0] == [(first, 9, 10)], "a row that came later does not overtake it"
    scheduler.remove(first)
    assert run(scheduler)[0] == [(last, 0, 9), (later, 0, 1)]


def test_a_row_preempted_while_it_is_sampled_waits_for_its_token():
    scheduler, arrive = make(FakeGroup(4))
    first, last = arrive(7), arrive(7)
    run(scheduler), run(scheduler, sampled=False)
    first.tokens.append(7)
    assert run(scheduler)[0] == [(first, 8, 9)] and last.state is RequestState.WAITING
    scheduler.remove(first)
    assert run(scheduler)[0] == [], "its token would be sampled twice"
    last.tokens.append(7)
    assert run(scheduler)[0] == [(last, 0, 9)]


def test_a_slow_call_does_not_hold_up_those_that_wait_behind_it():
    scheduler, arrive = make(FakeGroup(4))
    first, slow, later = arrive(7), arrive(7), arrive(2)
    run(scheduler), run(scheduler, sampled=False)
    first.tokens.append(7)
    run(scheduler)
    assert slow.state is RequestState.WAITING
    assert run(scheduler)[0] == [(first, 9, 10), (later, 0, 2)]
    scheduler.remove(first)
    slow.tokens.append(7)
    assert run(scheduler)[0] == [(slow, 0, 9), (later, 2, 3)], "in order of arrival again"


def test_duplicates_share_blocks_until_they_diverge():
    group = FakeGroup(8)
    scheduler, arrive = make(group)
    rows = arrive(6, duplicates=2)
    assert run(scheduler)[0] == [(rows[0], 0, 6)]
    assert group.blocks.used_blocks == 2 and scheduler.running == rows
    chunks, step = run(scheduler)
    assert chunks == [(row, 6, 7) for row in rows]
    assert len(step.copies[0]) == 2, "the last owner keeps the block"


def test_duplicates_have_arrived_with_the_first_row():
    scheduler, arrive = make(FakeGroup(4))
    (first_row, duplicate), other = arrive(7, duplicates=1), arrive(7)
    run(scheduler)
    assert scheduler.running == [first_row, duplicate, other]
    run(scheduler)
    assert scheduler.running == [first_row, duplicate] and scheduler.waiting == [other]


def test_a_row_taken_out_takes_duplicates_that_never_ran_with_it():
    scheduler, arrive = make(FakeGroup(8))
    rows = arrive(6, duplicates=2)
    scheduler.remove(rows[0])
    assert [row.state for row in rows] == [RequestState.OUT] * 3
    assert run(scheduler)[0] == []


def test_a_duplicate_taken_out_early_never_runs():
    scheduler, arrive = make(FakeGroup(8))
    first_row, gone, stays = arrive(6, duplicates=2)
    scheduler.remove(gone)
    run(scheduler)
    assert scheduler.running == [first_row, stays]


def test_a_preempted_row_keeps_its_duplicates():
    group = FakeGroup(6)
    scheduler, arrive = make(group, budget=4)
    first, (first_row, duplicate) = arrive(3), arrive(12, duplicates=1)
    run(scheduler)
    held = group.blocks.allocate(4)
    run(scheduler)
    assert run(scheduler)[0] == [(first, 4, 5)] and first_row.state is RequestState.WAITING
    assert first_row.duplicates == [duplicate] and duplicate.state is RequestState.NEW
    scheduler.remove(first)
    group.blocks.free(held)
    assert [run(scheduler)[0] for _ in range(3)] == [[(first_row, at, at + 4)] for at in (0, 4, 8)]
    assert scheduler.running == [first_row, duplicate]


def test_impossible_rows_fail_at_once_however_many():
    scheduler, arrive = make(FakeGroup(4), FakeGroup(2, window=3))
    rows = [arrive(17) for _ in range(2000)]
    small = arrive(3)
    chunks, step = run(scheduler)
    assert [request for request, _ in step.failed] == rows and chunks == [(small, 0, 3)]
    error = step.failed[0][1]
    assert (error.needed, error.total) == (5, 4)
    assert all(row.state is RequestState.OUT for row in rows)


def test_a_row_may_fill_the_pool_to_the_last_slot():
    scheduler, arrive = make(FakeGroup(2))
    row = arrive(8)
    assert run(scheduler)[0] == [(row, 0, 8)]
    chunks, step = run(scheduler)
    assert chunks == [] and step.failed[0][0] is row
    assert (step.failed[0][1].needed, step.failed[0][1].total) == (3, 2)


def test_a_small_window_pool_takes_a_long_prompt_in_small_chunks():
    group = FakeGroup(3, window=4)
    scheduler, arrive = make(group)
    row = arrive(20)
    ends = [run(scheduler)[0][0][2] for _ in range(3)]
    assert ends == [12, 20, 21] and row.state is RequestState.RUNNING


def test_rows_that_decode_in_a_window_promise_no_more_than_it_holds():
    group = FakeGroup(12, window=4)
    scheduler, arrive = make(group, budget=16)
    rows = [arrive(8) for _ in range(3)]
    for _ in range(12):
        run(scheduler)
    newcomer = arrive(8)
    assert run(scheduler)[0][-1] == (newcomer, 0, 8) and set(rows) < set(scheduler.running)


def test_a_row_alone_may_exceed_the_budget_when_others_hold_the_blocks():
    group = FakeGroup(4, capacity=8)
    scheduler, arrive = make(group)
    group.blocks.allocate(3)
    first, second = arrive(8), arrive(8)
    assert run(scheduler)[0] == [(first, 0, 8)] and group.blocks.total_blocks == 5
    assert run(scheduler)[0] == [(first, 8, 9)] and second.state is RequestState.WAITING
    scheduler.remove(first)
    assert run(scheduler)[0] == [(second, 0, 8)] and group.blocks.total_blocks == 6


def test_a_row_alone_waits_for_blocks_that_will_be_free_soon():
    group = FakeGroup(4, capacity=8)
    scheduler, arrive = make(group)
    held = group.blocks.allocate(1)
    row = arrive(8)
    run(scheduler), run(scheduler)
    row.tokens += [7, 7, 7]  # More than three blocks hold.
    assert (
        run(scheduler, may_exceed_budget=False)[0] == []
        and row.state is RequestState.WAITING
        and not row.tables[0].blocks
    )
    assert run(scheduler, may_exceed_budget=False)[0] == [] and group.blocks.total_blocks == 4
    group.blocks.free(held)
    assert run(scheduler, may_exceed_budget=False)[0] == [(row, 0, 13)] and group.blocks.total_blocks == 4


@pytest.mark.parametrize("is_running", [False, True])
def test_a_row_alone_fails_when_memory_refuses_and_leaves_nothing_behind(is_running):
    groups = FakeGroup(4), FakeGroup(4, window=8)
    scheduler, arrive = make(*groups, budget=4)
    row = arrive(8)
    if is_running:
        run(scheduler)
    held = groups[1].blocks.allocate(groups[1].blocks.free_blocks)
    step = scheduler.schedule()
    [(failed, error)] = step.failed
    assert failed is row and isinstance(error, OutOfBlocksError)
    assert (error.needed, error.free, error.total) == (2, 4 - len(held), 4)
    assert step.copies == [[], []] and groups[0].blocks.used_blocks == 0
    groups[0].blocks.check_integrity([])


def test_a_row_that_yields_after_its_first_group_leaves_no_copies():
    groups = FakeGroup(8), FakeGroup(3, window=8)
    scheduler, arrive = make(*groups)
    first_row, duplicate = arrive(6, duplicates=1)
    run(scheduler)
    groups[1].blocks.allocate(1)
    first_row.num_sampled = len(first_row.tokens)  # Its call is slow: the duplicate runs alone, and no block is left.
    _, step = run(scheduler)
    assert duplicate.state is RequestState.WAITING and step.copies == [[], []]
    groups[0].blocks.check_integrity([first_row.tables[0].blocks])


def run_ahead(scheduler):
    """One step whose rows go on without their tokens. Returns its (row, start, end)."""
    chunks, _ = run(scheduler, sampled=False)
    for row in scheduler.running:
        row.runs_ahead = row.runs_ahead or row.is_sampling
    return chunks


def test_a_row_ahead_runs_one_token_that_is_not_known():
    scheduler, arrive = make(FakeGroup(32))
    row = arrive(4)
    run_ahead(scheduler)
    step = scheduler.schedule()
    [chunk] = step.chunks
    assert (chunk.start, chunk.end, chunk.tokens, chunk.is_ahead, chunk.samples) == (4, 5, [0], True, True)
    row.add_token(7)
    scheduler.commit(step)
    assert (row.tokens[4:], row.num_stored, row.is_sampling) == ([7], 5, True), "the token after that is to come"


def test_a_row_that_has_ended_while_its_chunk_ran_has_stored_nothing():
    group = FakeGroup(32)
    scheduler, arrive = make(group)
    ended, other = arrive(4), arrive(2)
    run_ahead(scheduler)
    step = scheduler.schedule()
    scheduler.remove(ended)
    other.add_token(7)
    scheduler.commit(step)
    assert (ended.num_stored, other.num_stored) == (0, 3) and group.blocks.used_blocks == 1


@pytest.mark.parametrize("others", [1, 0])
def test_a_row_ahead_waits_for_its_token_rather_than_for_blocks(others):
    """It neither preempts a row, nor fails, nor exceeds the budget; with its token it does."""
    group = FakeGroup(2 + 2 * others)
    scheduler, arrive = make(group)
    rows = [arrive(7) for _ in range(1 + others)]
    run(scheduler), run_ahead(scheduler)
    step = scheduler.schedule()
    assert (step.chunks, step.failed, scheduler.running) == ([], [], rows) and group.blocks.free_blocks == 0
    for row in rows:
        row.add_token(7)
    chunks, step = run(scheduler)
    if others:
        assert chunks == [(rows[0], 8, 9)] and rows[1].state is RequestState.WAITING
    else:
        assert [row for row, _ in step.failed] == rows


def test_a_row_ahead_that_is_preempted_waits_for_its_token():
    scheduler, arrive = make(FakeGroup(4))
    first, last = arrive(8), arrive(7)
    run_ahead(scheduler)
    first.add_token(7)
    assert run(scheduler)[0] == [(first, 8, 9)] and last.state is RequestState.WAITING
    scheduler.remove(first)
    assert run(scheduler)[0] == [], "it would run a token that nobody knows"
    last.add_token(7)
    assert run(scheduler)[0] == [(last, 0, 8)]


def test_an_aborted_step_leaves_a_row_ahead_as_it_was():
    scheduler, arrive = make(FakeGroup(32))
    row = arrive(4)
    run_ahead(scheduler)
    scheduler.abort(scheduler.schedule())
    assert (row.num_stored, row.runs_ahead, row.is_sampling) == (4, True, False)
    [chunk] = scheduler.schedule().chunks
    assert (chunk.start, chunk.end, chunk.is_ahead) == (4, 5, True)
