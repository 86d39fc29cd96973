"""Swap blocks come back bit for bit, in one piece; and when moving them pays."""

import os

import pytest
import torch

from hf_paged.compat import devices
from hf_paged.config import PagedConfig
from hf_paged.memory import swap_space
from hf_paged.memory.kv_format import BlockShape, NativeFormat, Part
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.memory.swap_costs import Moved, SwapCosts
from hf_paged.memory.swap_space import FileStore, HostStore, SwapSpace, make_swap_space

CPU = torch.device("cpu")


class ScaledPages(NativeFormat):
    """Pages of four parts, of which those of the scales are small."""

    def parts(self, head_dim):
        return Part(torch.int8, head_dim), Part(torch.float32, 1)


def layers(kv_format=NativeFormat, dtype=torch.float32, device=CPU, count=3):
    """Storages whose pages hold random bytes, NaN and all."""
    storages = [KVStorage(kv_format(dtype), BlockShape(2, 4, 8, 6), device, num_blocks=7) for _ in range(count)]
    for page in pages_of(storages):
        page.copy_(torch.randint(0, 256, page.view(torch.uint8).shape, dtype=torch.uint8).view(page.dtype))
    return storages


def pages_of(storages):
    return [page for storage in storages for page in storage.pages]


def read(storages, blocks):
    """The bytes of some blocks, page by page."""
    return [page.cpu()[blocks].view(torch.uint8) for page in pages_of(storages)]


def assert_moves(store, storages):
    before, other = read(storages, [1, 4, 6]), read(storages, [0, 3])
    for moves in ([(1, 0), (4, 5)], [(6, 2)]):
        store.make_room(moves)
        store.spill(moves)
    for page in pages_of(storages):
        page[[1, 4, 6]] = torch.zeros_like(page[[1, 4, 6]])
    store.restore([(5, 2), (0, 5)])
    store.restore([(2, 1)])
    for after, wanted in zip(read(storages, [5, 2, 1]), before, strict=True):
        assert torch.equal(after, wanted)
    for after, wanted in zip(read(storages, [0, 3]), other, strict=True):
        assert torch.equal(after, wanted), "a block that was not moved has changed"


@pytest.mark.parametrize("store", [FileStore, HostStore])
@pytest.mark.parametrize(
    ("kv_format", "dtype"),
    [(NativeFormat, torch.float32), (NativeFormat, torch.bfloat16), (ScaledPages, torch.float32)],
)
def test_blocks_come_back_bit_for_bit(store, kv_format, dtype):
    storages = layers(kv_format, dtype)
    assert_moves(store(storages), storages)


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_a_block_of_many_layers_is_written_in_as_many_calls_as_the_system_wants(most, monkeypatch):
    monkeypatch.setattr(swap_space, "_MOST_BUFFERS", most)
    storages, calls, pwritev = layers(count=5), [], os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *given: calls.append(given) or pwritev(*given))
    assert_moves(FileStore(storages), storages)
    assert len(calls) == 3 * -(-10 // most)


def test_a_device_is_asked_once_for_a_block_whatever_its_layers(fake_device):
    storages = layers(device=fake_device.device)
    store = HostStore(storages)
    assert_moves(store, storages)
    with fake_device.watch() as traffic:
        store.spill([(1, 0), (4, 5)])
        store.restore([(0, 1), (5, 4)])
    assert (traffic.uploads, traffic.downloads, traffic.waits) == (2 + 2, 2, 0), "two block lists, and two blocks"


def test_memory_that_the_system_does_not_pin_serves_too(monkeypatch):
    def refuse(*shape, dtype, pin_memory=False):
        if pin_memory:
            raise RuntimeError("no memory can be pinned")
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(devices.torch, "empty", refuse)
    assert devices.host_memory((3, 5)).shape == (3, 5)


def test_swap_space_is_divided_into_as_many_blocks_of_each_group():
    pool = KVPool(PagedConfig(block_size=4, memory_budget="1MiB", swap_space=1000 * 4))
    states = torch.zeros(1, 2, 1, 8)
    for window, count in ((None, 3), (8, 1)):
        group = pool.group(KVCacheSpec(window, torch.float32, CPU), states, states, num_layers=4)
        for index in range(count):
            group.layer(index, states, states)
    layer_bytes = 4 * 2 * 8 * 4 * 2
    space = make_swap_space(pool)
    assert space.block_bytes == [3 * layer_bytes, layer_bytes] and space.num_blocks == 4000 // (4 * layer_bytes)


def test_a_move_is_timed():
    space = SwapSpace([FileStore(layers())], num_bytes=10**6, is_asynchronous=False)
    [size] = space.block_bytes
    moved = space.move([[(1, 0), (2, 1)]], [[]])
    assert (moved.spilled, moved.restored) == (2 * size, 0) and moved.spill_seconds > 0
    moved = space.move([[]], [[(1, 3)]])
    assert (moved.spilled, moved.restored) == (0, size) and moved.restore_seconds > 0


def test_a_block_that_was_not_spilled_cannot_be_read():
    store = FileStore(layers())
    with pytest.raises(OSError, match="the file of the swap space is gone"):
        store.restore([(0, 1)])
    store.make_room([(1, 0)])
    store.spill([(1, 0)])
    with pytest.raises(OSError, match="0 of 1,344 bytes were read"):
        store.restore([(3, 1)])
    store.renew()
    with pytest.raises(OSError, match="the file of the swap space is gone"):
        store.restore([(0, 1)])


def test_moving_pays_until_it_is_measured_to_cost_more_than_computing():
    costs = SwapCosts(block_bytes=1000, block_size=10)
    assert costs.spilling_pays and costs.restoring_pays, "nothing is known"
    costs.note_move(Moved(2000, 1.0, 1000, 0.25))
    assert costs.spilling_pays, "what it costs to compute is not known"
    costs.note_step(100, 6.0)  # 0.6 s a block, against 0.5 s to spill one and 0.25 s to restore it.
    assert not costs.spilling_pays and costs.restoring_pays
    costs.note_step(100, 40.0)
    assert costs.compute == pytest.approx(0.06 + 0.2 * (0.4 - 0.06)) and costs.spilling_pays


def test_what_is_not_timed_and_short_steps_say_nothing():
    costs = SwapCosts(block_bytes=1000, block_size=10)
    assert costs.note_move(Moved(spilled=1000, restored=1000)) == 0.0
    costs.note_step(31, 1.0)
    assert costs.spill is costs.restore is costs.compute is None
    assert costs.note_move(Moved(1000, 0.5)) == 0.5


def test_a_disk_that_was_slow_is_tried_again():
    costs = SwapCosts(block_bytes=1000, block_size=10)
    costs.note_move(Moved(1000, 3.0, 1000, 2.0))
    costs.note_step(100, 10.0)  # 1 s a block
    steps = 0
    while not costs.restoring_pays:
        costs.note_step(1, 1.0)
        steps += 1
    assert 100 < steps < 300
