"""Packed steps on a device that is not the CPU: `support.fake_device` stands for a GPU."""

import copy

import pytest
import torch

import hf_paged
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.generation.engine import Engine
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


def test_steps_run_one_ahead_there_and_tokens_cross_once(fake_device, monkeypatch):
    """The host waits when it reads them, after the next step is launched, and for nothing else but uploads."""
    dense, paged = packing.pair(blocks=60, token_budget=64)
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    options = {**packing.LENGTHS, "eos_token_id": [5, 6, 7, 8, 9, 10]}
    expected = dense.generate(ids, **options)
    paged = copy.deepcopy(paged).to(fake_device.device)
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4, memory_budget=60 * packing.BLOCK, token_budget=64))
    ids = ids.to(fake_device.device)
    assert torch.equal(paged.generate(ids, **options).cpu(), expected)
    traffic: dict[str, list] = {}

    def watch(owner, name):
        real, seen = getattr(owner, name), traffic.setdefault(name, [])

        def watched(*args, **kwargs):
            with fake_device.watch() as crossed:
                result = real(*args, **kwargs)
            seen.append(crossed)
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((Engine, "_run_step"), (Engine, "_finish_step"), (ModelRunner, "prepare")):
        watch(owner, name)
    watch(PendingTokens, "put_into")
    watch(PendingTokens, "read")
    assert torch.equal(paged.generate(ids, **options).cpu(), expected)
    waits = {name: sum(crossed.waits for crossed in seen) for name, seen in traffic.items()}
    assert len(traffic["put_into"]) > 3 and len(traffic["read"]) == waits["read"]
    assert waits["_run_step"] == waits["prepare"] + waits["read"], "the host waits for something else"
    assert all(crossed == type(crossed)() for crossed in traffic["_finish_step"]), "a section works on the device"
