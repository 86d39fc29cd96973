"""Memory goes back to the system when no call runs: that of free blocks, never what a neighbour holds."""

import mmap
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_paged
from hf_paged import PagedConfig, atomic
from hf_paged.memory import kv_pool
from hf_paged.memory.kv_format import BlockShape, NativeFormat
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import registry
from support import zoo
from support.packing import BLOCK, LENGTHS, pair
from support.parity import assert_rows_equal

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no memory is given back")


def resident_bytes(storage: KVStorage) -> int:
    """Bytes of a storage's pages that the system has memory for, as /proc/self/smaps says."""
    begins = {page.data_ptr() for page in storage.pages}
    total = 0
    with open("/proc/self/smaps", errors="replace") as lines:
        for line in lines:
            first, *rest = line.split()
            if "-" in first and not first.endswith(":"):
                begin, end = (int(number, 16) for number in first.split("-"))
                is_ours = any(begin <= address < end for address in begins)
            elif first == "Rss:" and is_ours:
                total += int(rest[0]) * 1024
    return total


@settings(max_examples=60)
@given(
    shape=st.builds(BlockShape, st.integers(1, 5), st.sampled_from([4, 16]), st.integers(1, 96), st.integers(1, 96)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    vacated=st.sets(st.integers(0, 39)),
)
def test_what_other_blocks_hold_stays(shape, dtype, vacated):
    storage = KVStorage(NativeFormat(dtype), shape, CPU, 40)
    for page in storage.pages:
        page.fill_(1.5)
    storage.vacate(sorted(vacated))
    others = [block for block in range(40) if block not in vacated]
    for page in storage.pages:
        assert (page[others] == 1.5).all()
        # What lies in whole pages of the system is gone: they read as zeros.
        block_bytes, flat = page[0].nbytes, page.view(torch.uint8).flatten()
        is_vacated = torch.zeros(40 * block_bytes, dtype=torch.bool)
        for block in vacated:
            is_vacated[block * block_bytes : (block + 1) * block_bytes] = True
        for begin in range(0, len(flat), mmap.PAGESIZE):
            part = slice(begin, begin + mmap.PAGESIZE)
            if len(flat[part]) == mmap.PAGESIZE and is_vacated[part].all():
                assert not flat[part].any()


def test_the_memory_is_gone_and_comes_again():
    storage = KVStorage(NativeFormat(torch.float32), BlockShape(2, 16, 64, 64), CPU, 1000)  # 8 KiB a page.
    for page in storage.pages:
        page[:800] = 1.0
    full = resident_bytes(storage)
    assert full >= 800 * storage.block_bytes
    storage.vacate(range(100, 800))
    assert resident_bytes(storage) == full - 700 * storage.block_bytes
    for page in storage.pages:
        page[100:200] = 2.0
        assert (page[:100] == 1.0).all() and (page[100:200] == 2.0).all()
    assert resident_bytes(storage) == full - 600 * storage.block_bytes


@pytest.fixture
def idle_at_once(monkeypatch):
    """Let a process be idle soon after its last section."""
    monkeypatch.setattr(atomic, "_IDLE", 0.05)


def wait_until(holds):
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_is_given_back(pool, monkeypatch):
    """Free blocks lose their memory at once, cached ones beyond the share of 20 later."""
    (group,) = pool.groups.values()
    blocks = group.blocks
    wait_until(lambda: blocks.free_blocks == blocks.fresh_blocks)
    assert blocks.cached_blocks > blocks.cache_blocks == 20
    monkeypatch.setattr(kv_pool, "_CACHED_SECONDS", 0.0)
    wait_until(lambda: blocks.cached_blocks == 20 and blocks.free_blocks == blocks.fresh_blocks)
    pool.check_integrity()


def test_an_idle_pool_keeps_its_share_and_answers_the_same(idle_at_once, monkeypatch):
    """Free blocks go after a second, cached ones beyond the share after a minute; a prefix within it is still found."""
    dense, paged = pair(blocks=160)
    given_back = []
    vacate = KVStorage.vacate
    monkeypatch.setattr(
        KVStorage, "vacate", lambda self, blocks: (given_back.append(len(blocks)), vacate(self, blocks))
    )
    for seed in range(3):
        monkeypatch.setattr(kv_pool, "_CACHED_SECONDS", 60.0)
        inputs = zoo.prompts([25, 40, 33, 30], seed)
        assert_rows_equal(dense, inputs, dense.generate(**inputs, **LENGTHS), paged.generate(**inputs, **LENGTHS))
        (pool,) = registry.pools_under(paged)
        assert_is_given_back(pool, monkeypatch)
    assert sum(given_back) > 3 * 20
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 3 and not stats.fallbacks and stats.page_reads


def test_free_blocks_up_to_the_share_keep_their_memory(idle_at_once):
    _, paged = pair()
    config = PagedConfig(block_size=4, memory_budget=160 * BLOCK, prefix_cache=False, prefix_cache_share=0.25)
    hf_paged.configure(paged, config)
    paged.generate(**zoo.prompts([25, 40, 33, 30], 0), **LENGTHS)
    (group,) = registry.pools_under(paged)[0].groups.values()
    wait_until(lambda: group.blocks.fresh_blocks == 160 - 40)
    assert group.blocks.free_blocks == 160


def test_nothing_is_given_back_while_a_call_runs(monkeypatch):
    """A forward is long, and no section runs meanwhile."""
    _, paged = pair()
    config = PagedConfig(block_size=4, memory_budget=160 * BLOCK, prefix_cache=False, prefix_cache_share=0.0)
    hf_paged.configure(paged, config)
    paged.generate(**zoo.prompts([25, 40], 0), **LENGTHS)
    (pool,) = registry.pools_under(paged)
    (group,) = pool.groups.values()
    left = []

    def give_back(*_):
        pool.give_back(1e9)
        left.append(group.blocks.free_blocks - group.blocks.fresh_blocks)

    handle = paged.register_forward_pre_hook(give_back)
    paged.generate(**zoo.prompts([8], 1), **LENGTHS)
    handle.remove()
    assert left and min(left) > 0, "blocks of the call before keep their memory for this one"
    pool.give_back(1e9)
    assert group.blocks.free_blocks == group.blocks.fresh_blocks == 160


def test_idle_work_is_called_until_it_is_done(idle_at_once, monkeypatch):
    seconds, is_done = [], threading.Event()

    def work(idle):
        seconds.append(idle)
        if len(seconds) == 3:
            is_done.set()
            return False
        return True

    monkeypatch.setattr(atomic, "_when_idle", [work])
    atomic.atomically(lambda: None)
    assert is_done.wait(20)
    assert seconds == pytest.approx([0.05, 0.1, 0.15])
    assert atomic.atomically(lambda: 7) == 7, "sections run on afterwards"


def test_idle_work_that_fails_harms_no_section(idle_at_once, monkeypatch):
    called = threading.Event()

    def work(idle):
        called.set()
        raise RuntimeError("idle work fails")

    monkeypatch.setattr(atomic, "_when_idle", [work])
    assert atomic.atomically(lambda: 1) == 1
    assert called.wait(20)
    assert atomic.atomically(lambda: 2) == 2
