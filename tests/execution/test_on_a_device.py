"""Packed steps on a device that is not the CPU: `support.fake_device` stands for a GPU."""

import copy

import pytest
import torch

import hf_paged
from support import packing


def test_the_fake_device_computes_as_the_cpu_does(fake_device):
    values = torch.randn(3, 4)
    moved = values.to(fake_device.device)
    assert moved.device == fake_device.device
    assert torch.equal(moved.t().softmax(0).cpu(), values.t().softmax(0))
    moved[1:].mul_(2)
    assert torch.equal(moved.cpu(), torch.cat([values[:1], values[1:] * 2]))


def test_the_fake_device_is_strict(fake_device):
    values = torch.ones(3, device=fake_device.device)
    with pytest.raises(RuntimeError, match="same device"):
        values + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        values + torch.ones(3, device=fake_device.second)
    with fake_device.memory_left(1000), pytest.raises(torch.OutOfMemoryError):
        torch.empty(1001, dtype=torch.uint8, device=fake_device.device)


def test_the_fake_device_counts_what_crosses(fake_device):
    with fake_device.watch() as traffic:
        values = torch.arange(3).to(fake_device.device)
        (values + 1).tolist()
        values[[0, 2]]
    assert (traffic.uploads, traffic.downloads) == (2, 1)
    assert traffic.waits == 3  # Indices in a list are copied, and waited for.
    pinned = torch.zeros(3).pin_memory()
    with fake_device.watch() as traffic:
        torch.empty(3, device=fake_device.device).copy_(pinned, non_blocking=True)
    assert (traffic.uploads, traffic.waits) == (1, 0)


def test_rows_run_packed_on_a_device(fake_device):
    dense, paged = packing.pair(blocks=24)
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    expected = dense.generate(ids, do_sample=False, **packing.LENGTHS)
    paged = copy.deepcopy(paged).to(fake_device.device)  # The pair is shared by all tests.
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4, memory_budget=24 * packing.BLOCK, token_budget=16))
    found = paged.generate(ids.to(fake_device.device), do_sample=False, **packing.LENGTHS)
    assert found.device == fake_device.device
    assert torch.equal(found.cpu(), expected)
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and stats.page_reads and not stats.gathers and not stats.fallbacks
