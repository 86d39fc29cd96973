"""PrefixCache and what guards it: which blocks are found, by whom, and until when. No models here."""

import contextvars
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hf_paged
from hf_paged.scheduling.cache_salt import current_salt
from hf_paged.scheduling.request import Request, RequestState
from support.fake_groups import FakeGroup, Rows


def test_full_blocks_are_found_and_the_last_token_is_always_run():
    rows = Rows(FakeGroup(32))
    assert rows.run(range(10)) == 0
    assert rows.run(range(10)) == 8, "two full blocks, not the tokens of the third"
    assert rows.run(range(12)) == 8 and rows.run(range(12)) == 8, "the last token is wanted, so its block is run"
    assert rows.run([*range(8), 50, 51, 52]) == 8
    assert rows.run([*range(6), 50, 51, 52]) == 4
    assert rows.run([50, *range(9)]) == 0, "the same tokens at other positions"
    assert (rows.prefix.counts.lookups, rows.prefix.counts.hit_tokens) == (7, 36)


def test_a_row_finds_what_another_still_uses_and_owns_it_too():
    group = FakeGroup(8)
    rows = Rows(group, budget=8)
    first = rows.arrive(range(10))
    rows.step()
    second = rows.arrive([*range(8), 20, 21])
    assert rows.step() == [(first, 8, 10), (second, 8, 10)]
    assert group.blocks.used_blocks == 0 and group.blocks.cached_blocks == 2


def test_a_row_waits_a_step_for_a_block_that_another_computes_and_the_rest_goes_on():
    rows = Rows(FakeGroup(32), budget=64)
    first, second, other = rows.arrive(range(10)), rows.arrive(range(10)), rows.arrive(range(30, 40))
    assert rows.step() == [(first, 0, 10), (other, 0, 10)]
    assert rows.step() == [(second, 8, 10)]


def test_no_other_row_gets_the_blocks_of_one_that_waits_a_step():
    rows = Rows(FakeGroup(8), budget=64)
    first, second, other = rows.arrive(range(11)), rows.arrive(range(11)), rows.arrive(range(30, 41))
    assert rows.step() == [(first, 0, 11)] and other.state is RequestState.WAITING
    assert rows.step() == [(second, 8, 11), (other, 0, 11)]


def test_a_row_that_waits_a_step_goes_on_by_itself_if_the_block_never_comes():
    rows = Rows(FakeGroup(32))
    first, second = rows.arrive(range(10)), rows.arrive(range(10))
    assert [chunk.request for chunk in rows.scheduler.schedule().chunks] == [first]
    rows.scheduler.remove(first)  # Its forward raised.
    assert rows.step() == [(second, 0, 10)]


def test_salts_are_strangers_and_rows_without_one_are_neither_found_nor_find():
    rows = Rows(FakeGroup(64))
    for salt in ("", "a", "b"):
        assert rows.run(range(10), salt) == 0 and rows.run(range(10), salt) == 8
    cached, counts = rows.groups[0].blocks.cached_blocks, rows.prefix.counts.lookups
    assert rows.run(range(10), None) == rows.run(range(10), None) == 0
    assert rows.groups[0].blocks.cached_blocks == cached and rows.prefix.counts.lookups == counts


def test_another_identity_drops_everything_and_so_does_the_way_back():
    group = FakeGroup(16)
    rows = Rows(group)
    rows.run(range(10))
    rows.prefix.use(b"model")
    assert group.blocks.cached_blocks == 2
    for identity in (b"trained", b"model"):
        rows.prefix.use(identity)
        assert group.blocks.cached_blocks == 0 and group.blocks.free_blocks == 16
        assert rows.run(range(10)) == 0 and rows.run(range(10)) == 8


def test_rows_that_run_while_the_weights_change_store_nothing_even_if_they_change_back():
    rows = Rows(FakeGroup(16), budget=4)
    row = rows.arrive(range(12))
    rows.step()
    rows.prefix.use(b"trained"), rows.prefix.use(b"model")
    assert rows.step() == [(row, 4, 8)] and rows.step() == [(row, 8, 12)]
    assert rows.groups[0].blocks.cached_blocks == 0 and rows.run(range(10)) == 0


def test_equal_block_hashes_are_not_believed_without_equal_tokens():
    rows = Rows(FakeGroup(16))
    rows.run(range(10))
    for entry in rows.prefix._entries.values():
        entry.tokens = entry.tokens[:-1] + b"\1"
    assert rows.run(range(10)) == 0


def test_the_deepest_block_of_the_row_used_longest_ago_is_evicted_first():
    group = FakeGroup(6)
    rows = Rows(group)
    rows.run(range(13)), rows.run(range(50, 63))
    assert rows.run(range(5)) == 4, "the first row's first block is used again"
    found = []
    for _ in range(5):
        group.blocks.allocate(1)
        found.append([rows.prefix.match(_row(rows, tokens)).num_blocks for tokens in (range(13), range(50, 63))])
    assert found == [[2, 3], [1, 3], [1, 2], [1, 1], [1, 0]], "a free block first; the one used again last"


def test_blocks_are_evicted_only_when_they_are_wanted():
    group = FakeGroup(8)
    rows = Rows(group)
    rows.run(range(12)), rows.run(range(20, 32))
    assert group.blocks.num_evictions == 0
    assert (group.blocks.free_blocks, group.blocks.cached_blocks) == (2, 6)
    rows.run(range(40, 52))
    assert group.blocks.num_evictions == 1


def test_a_preempted_row_finds_its_own_blocks_again():
    group = FakeGroup(5)
    rows = Rows(group)
    first, last = rows.arrive(range(7)), rows.arrive(range(20, 27))

    def decode():
        step = rows.scheduler.schedule()
        rows.scheduler.commit(step)
        for chunk in step.chunks:
            chunk.request.tokens.append(90 + len(chunk.request.tokens))
        return [(chunk.request, chunk.start, chunk.end) for chunk in step.chunks]

    while last.state is not RequestState.WAITING or last.num_preemptions == 0:
        decode()
    rows.scheduler.remove(first)
    assert decode()[0][1] == 8 and len(last.tokens) > 9


def test_a_block_is_hashed_when_all_its_tokens_are_known():
    """The last of them is known to the device only while its step is planned, beside a row that waits."""
    rows = Rows(FakeGroup(32))
    row = rows.arrive(range(7))
    rows.scheduler.commit(rows.scheduler.schedule())
    row.runs_ahead = True
    other = rows.arrive(range(50, 53))
    step = rows.scheduler.schedule()
    assert [(chunk.request, chunk.end) for chunk in step.chunks] == [(row, 8), (other, 3)]
    assert rows.prefix.completed_hashes(row, 7, 8) == [] and len(row.block_hashes) == 2
    row.add_token(90)
    rows.scheduler.commit(step)
    rows.scheduler.remove(row), rows.scheduler.remove(other)
    assert rows.run([*range(7), 90, 91]) == 8


def test_a_window_needs_its_own_blocks_only():
    full, window = FakeGroup(32), FakeGroup(32, window=5)
    rows = Rows(full, window)
    rows.run(range(22))
    hit = rows.prefix.match(_row(rows, range(22)))
    assert [hit.num_blocks, *map(len, hit.blocks)] == [5, 5, 1], "the next token sees four before it"
    in_window = _blocks_in_order(rows, range(22), group=1)
    for block in (in_window[0], in_window[1], in_window[3], in_window[4]):
        window.blocks.evict(block)
    assert rows.run(range(22)) == 12, "the longest beginning whose window is there"


def test_full_attention_needs_every_block():
    full, window = FakeGroup(32), FakeGroup(32, window=5)
    rows = Rows(full, window)
    rows.run(range(22))
    full.blocks.evict(_blocks_in_order(rows, range(22), group=0)[2])
    assert rows.run(range(22)) == 8


def test_a_window_of_one_token_needs_no_block():
    rows = Rows(FakeGroup(32, window=1), FakeGroup(32))
    rows.run(range(10))
    for block in _blocks_in_order(rows, range(10), group=0):
        rows.groups[0].blocks.evict(block)
    assert rows.run(range(10)) == 8


def test_models_of_windows_alone_find_a_beginning_whose_first_blocks_are_gone():
    group = FakeGroup(32, window=6)
    rows = Rows(group)
    rows.run(range(30))
    in_window = _blocks_in_order(rows, range(30), group=0)
    for block in in_window[:5]:
        group.blocks.evict(block)
    assert rows.run(range(30)) == 28, "the last two blocks hold all that the next token sees"


def _blocks_in_order(rows, tokens, group):
    """The block of each full block of tokens in one group."""
    row = _row(rows, tokens)
    rows.prefix.match(row)
    rows.prefix._extend(row, len(tokens) // 4)
    return [rows.prefix._entries[block_hash].blocks[group] for block_hash in row.block_hashes[1:]]


def _row(rows, tokens):
    request = Request(list(tokens), [group.blocks for group in rows.groups])
    request.salt = ""
    return request


@given(st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 3), min_size=5, max_size=14)), max_size=12))
def test_a_row_finds_the_longest_beginning_that_was_run_under_its_salt(prompts):
    rows, seen = Rows(FakeGroup(200)), set()
    for salt, tokens in prompts:
        ends = [end for end in range(4, len(tokens), 4) if (salt, *tokens[:end]) in seen]
        assert rows.run(tokens, salt) == max(ends, default=0)
        seen.update((salt, *tokens[:end]) for end in range(4, len(tokens) + 1, 4))


def test_blocks_that_no_row_has_run_are_inserted_and_found():
    """Of a window what rows see that go on after them, or end with the last of them."""
    full, window = FakeGroup(32), FakeGroup(32, window=6)
    rows = Rows(full, window)
    row = _row(rows, range(20))
    assert rows.prefix.stored(row) is None
    assert [rows.prefix.num_lasting(number, 5) for number in (0, 1)] == [5, 3]
    for table, count in zip(row.tables, (5, 3)):
        table.start_at(20 - 4 * count)
        table.blocks, table.num_tokens = table.pool.allocate(count), 20
    row.num_stored = 20
    rows.prefix.insert(row)
    assert rows.prefix.stored(row) == [table.blocks for table in row.tables]
    row.release()
    rows.prefix.check_integrity()
    assert (full.blocks.cached_blocks, window.blocks.cached_blocks) == (5, 3)
    assert rows.run(range(20)) == 16 and rows.run(range(21)) == 20 and rows.run(range(15)) == 0


def test_what_is_inserted_twice_is_kept_once():
    rows = Rows(group := FakeGroup(32))
    rows.run(range(10))
    row = _row(rows, range(12))
    row.tables[0].blocks, row.num_stored = group.blocks.allocate(3), 12
    rows.prefix.insert(row)
    row.release()
    rows.prefix.check_integrity()
    assert group.blocks.cached_blocks == 3 and group.blocks.free_blocks == 29


def test_nothing_is_stored_while_it_is_suspended():
    rows = Rows(FakeGroup(32))
    rows.run(range(10))
    assert rows.prefix.serves(b"model") and not rows.prefix.serves(b"trained")
    rows.prefix.suspend()
    assert rows.prefix.stored(_row(rows, range(8))) is None and not rows.prefix.serves(b"model")


def test_the_salt_belongs_to_the_thread_that_set_it():
    seen = []
    with hf_paged.cache_salt("outer"):
        with hf_paged.cache_salt("inner"):
            seen.append(current_salt())
        seen.append(current_salt())
        threads = [
            threading.Thread(target=lambda: seen.append(current_salt())),
            threading.Thread(target=contextvars.copy_context().run, args=(lambda: seen.append(current_salt()),)),
        ]
        for thread in threads:
            thread.start(), thread.join()
    assert [*seen, current_salt()] == ["inner", "outer", "", "outer", ""]


def test_salts_are_text():
    with pytest.raises(TypeError, match=r"takes a text, got int: hf_paged.cache_salt\(str\(tenant\)\)"):
        with hf_paged.cache_salt(7):
            pass
    with pytest.raises(ValueError, match="cache_salt must be a text; got 7"):
        hf_paged.PagedConfig(cache_salt=7)
    with pytest.raises(ValueError, match="prefix_cache must be True or False; got 1"):
        hf_paged.PagedConfig(prefix_cache=1)
