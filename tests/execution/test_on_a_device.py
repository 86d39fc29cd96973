"""Packed steps on a device that is not the CPU: `support.fake_device` stands for a GPU."""

import copy

import pytest
import torch

import hf_paged
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.generation.engine import Engine
from hf_paged.models import registry
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
    assert stats.token_budget == 16
    assert stats.packed_calls == 1 and stats.page_reads and not stats.gathers and not stats.fallbacks


def test_a_step_on_a_device_runs_more_tokens(fake_device):
    _, model = packing.pair()
    model = copy.deepcopy(model)
    hf_paged.configure(model, hf_paged.PagedConfig(memory_budget=24 * packing.BLOCK))
    assert hf_paged.stats(model).token_budget == 512
    model.to(fake_device.device)
    assert hf_paged.stats(model).token_budget == 4096
    model.generate(torch.ones(1, 9, dtype=torch.long, device=fake_device.device), **packing.LENGTHS)
    assert hf_paged.stats(model).token_budget == registry.engine_of(model).scheduler.token_budget == 4096


def model_on(device) -> torch.nn.Module:
    """A model with steps of 64 tokens and no end of sequence, of whose calls each device has seen one."""
    model = copy.deepcopy(packing.pair()[1]).to(device)
    model.generation_config.eos_token_id = None
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=4, memory_budget=400 * packing.BLOCK, token_budget=64))
    generate(model, 4)
    return model


def generate(model, num_tokens: int) -> torch.Tensor:
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    return model.generate(ids.to(model.device), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)


def test_a_step_crosses_once_each_way(fake_device, monkeypatch):
    """Its numbers go up and its tokens come down, and the host waits for the tokens of the step before alone."""
    model, steps, run_step = model_on(fake_device.device), [], Engine._run_step

    def watched(*arguments):
        with fake_device.watch() as traffic:
            report = run_step(*arguments)
        steps.append((traffic.uploads, traffic.downloads, traffic.waits))
        return report

    monkeypatch.setattr(Engine, "_run_step", watched)
    generate(model, 20)
    # The first step has none before it, and the last turn reads the tokens of the last step.
    assert steps == [(1, 1, 0), *[(1, 1, 1)] * 19, (0, 0, 1)]


def test_what_is_outside_of_steps_does_not_grow_with_them(fake_device):
    """Uploads are not compared: every block that is taken is filled with NaN first, for these tests."""
    model, crossings = model_on(fake_device.device), []
    for num_tokens in (8, 24):
        with fake_device.watch() as traffic:
            generate(model, num_tokens)
        crossings.append([getattr(traffic, name) - num_tokens for name in ("downloads", "waits")])
    assert crossings[0] == crossings[1]


def test_copies_of_blocks_are_told_to_a_device_without_a_wait(fake_device):
    model = model_on(fake_device.device)
    [group] = registry.engine_of(model).pool.groups.values()
    storage = next(iter(group.layers.values()))
    for page in storage.pages:
        page[1:3] = torch.arange(2, device=page.device).view(2, 1, 1, 1) + 1.0
    with fake_device.watch() as traffic:
        group.copy_blocks([(1, 7), (2, 5)])
    assert (traffic.uploads, traffic.downloads, traffic.waits) == (1, 0, 0)
    for page in storage.pages:
        assert [page[block].unique().tolist() for block in (7, 5)] == [[1.0], [2.0]]


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
