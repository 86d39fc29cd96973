"""Blocks that make room are moved and brought back under `generate`: tokens stay those of dense, whatever fails."""

import copy
import errno
import gc
import os
import tempfile

import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.generation import engine as engine_module
from hf_paged.memory import swap_space
from hf_paged.memory.swap_costs import SwapCosts
from hf_paged.memory.swap_space import HostStore, SwapSpace
from hf_paged.models import registry
from support import swapping, zoo
from support.packing import BLOCK, LENGTHS, SAMPLE, compare
from support.parity import assert_rows_equal
from support.prefixes import own_pair
from support.swapping import crowds


@pytest.fixture
def always_pays(monkeypatch):
    swapping.always_pays(monkeypatch)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of engines."""
    said = []
    monkeypatch.setattr(engine_module.logger, "warning_once", said.append)
    return said


def small_pair(name="llama", blocks=22, swap_blocks=400):
    models = zoo.pair(name)
    swapping.configure(models[1], blocks, swap_blocks)
    return models


def engine_of(model):
    [engine] = [engine for pool in registry.pools_under(model) for engine in pool.engines]
    engine.scheduler.prefix.check_integrity()
    return engine


def run(models, **options):
    for inputs in crowds():
        compare(models, inputs, **options)
    return hf_paged.stats(models[1])


@pytest.mark.usefixtures("is_ahead", "always_pays")
@pytest.mark.parametrize(
    ("name", "options"), [("llama", SAMPLE), ("mistral", {}), ("gemma3_text", {})], ids=["llama", "mistral", "gemma3"]
)
def test_blocks_of_preempted_and_finished_rows_come_back(name, options):
    models = small_pair(name, swap_blocks=None)
    without = run(models, **options)
    swapping.configure(models[1])
    stats = run(models, **options)
    assert stats.spilled_blocks and stats.restored_blocks and not without.spilled_blocks
    assert stats.prefix_hit_tokens > 1.4 * without.prefix_hit_tokens
    assert stats.total_blocks == without.total_blocks, "and the pool stayed as small"
    engine = engine_of(models[1])
    # A row whose layers all have a window holds no more blocks at its end than when it came in.
    assert engine.scheduler.num_preemptions or name == "mistral", "no row was preempted"
    assert stats.swapped_bytes == engine.swapped_bytes > 0


@pytest.mark.usefixtures("always_pays")
def test_a_full_swap_space_gives_up_what_was_used_longest_ago():
    models = small_pair(swap_blocks=30)
    stats = run(models)
    assert stats.spilled_blocks > 30 and stats.restored_blocks
    assert stats.swapped_bytes == 30 * BLOCK
    assert os.fstat(engine_of(models[1])._swap_space._stores[0]._file).st_size == 30 * BLOCK


def test_nothing_is_moved_that_is_computed_sooner(monkeypatch):
    monkeypatch.setattr(SwapCosts, "_pays", lambda self, seconds_per_byte: False)
    stats = run(small_pair())
    assert stats.evictions and not stats.spilled_blocks and not stats.swapped_bytes


def test_costs_are_measured():
    models = small_pair()
    run(models)
    costs = engine_of(models[1]).scheduler.prefix.tier.costs
    assert costs.spill > 0 and costs.block_bytes == BLOCK and costs.block_size == 4


@pytest.mark.usefixtures("always_pays")
def test_weights_that_change_drop_what_was_spilled():
    models = own_pair()
    swapping.configure(models[1])
    compare(models, crowds()[0])
    assert hf_paged.stats(models[1]).swapped_bytes
    restored = hf_paged.stats(models[1]).restored_blocks
    with torch.no_grad():
        for model in models:
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    one = {name: tensor[2:3] for name, tensor in crowds()[0].items()}
    compare(models, one)
    stats = hf_paged.stats(models[1])
    assert stats.restored_blocks == restored and not stats.swapped_bytes
    engine_of(models[1])


def refuse(monkeypatch, name, at, error):
    """Let the n-th call of a function of the system fail, and all after it."""
    real, calls = getattr(os, name), [0]

    def refusing(*args):
        calls[0] += 1
        return error(*args) if calls[0] >= at else real(*args)

    monkeypatch.setattr(os, name, refusing)


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("is_ahead", "always_pays")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("pwritev", no_space),
        ("pwritev", lambda file, buffers, offset: 512),
        ("preadv", lambda file, buffers, offset: 0),
        ("preadv", no_space),
    ],
    ids=["full", "nearly full", "cut off", "unreadable"],
)
@pytest.mark.parametrize("at", [1, 7])
def test_a_file_that_fails_costs_no_call_and_one_warning(name, error, at, monkeypatch, warnings):
    refuse(monkeypatch, name, at, error)
    models = small_pair()
    stats = run(models)
    [text] = warnings
    assert (
        "the swap space is out of use from now on (OSError: " in text and "Set a smaller swap_space, or TMPDIR" in text
    )
    assert stats.restored_blocks < 10 and not stats.swapped_bytes
    engine = engine_of(models[1])
    assert engine.scheduler.prefix.tier is None and engine._swap_space is None


@pytest.mark.usefixtures("always_pays")
def test_a_folder_that_cannot_be_written_to_costs_one_warning(monkeypatch, warnings):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no folder")
    assert not run(small_pair()).spilled_blocks
    assert len(warnings) == 1 and "FileNotFoundError" in warnings[0]


@pytest.mark.usefixtures("always_pays")
def test_the_file_is_gone_with_the_pool():
    models = small_pair()
    compare(models, crowds()[0])
    engine = engine_of(models[1])
    file = engine._swap_space._stores[0]._file
    assert os.fstat(file).st_nlink == 0, "no name: its space is free however the process ends"
    del engine
    hf_paged.release(models[1])
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


@pytest.mark.usefixtures("always_pays")
def test_a_forked_child_leaves_the_file_to_its_parent():
    models = small_pair()
    for inputs in crowds()[:2]:
        compare(models, inputs)
    held = hf_paged.stats(models[1]).swapped_bytes
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            dropped = not hf_paged.stats(models[1]).swapped_bytes
            for inputs in crowds(4)[2:4]:
                models[1].generate(**inputs, **LENGTHS)
            code = 0 if dropped and hf_paged.stats(models[1]).swapped_bytes else 2
            engine_of(models[1])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hf_paged.stats(models[1]).swapped_bytes == held
    restored = hf_paged.stats(models[1]).restored_blocks
    for inputs in crowds()[:2]:
        compare(models, inputs)
    assert hf_paged.stats(models[1]).restored_blocks > restored


def test_a_space_that_holds_no_block_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(swap_space.logger, "warning_once", said.append)
    models = zoo.pair("llama")
    hf_paged.configure(models[1], PagedConfig(block_size=4, memory_budget=22 * BLOCK, token_budget=16, swap_space=100))
    compare(models, crowds()[0])
    assert said == [
        f"hf_paged: swap_space is 100 bytes, and a block of this model takes {BLOCK:,}: nothing is kept there. "
        "Raise swap_space."
    ]


def test_a_swap_space_needs_the_prefix_cache():
    with pytest.raises(ValueError, match="swap_space needs the prefix cache, .* got '1GiB' with prefix_cache=False"):
        PagedConfig(swap_space="1GiB", prefix_cache=False)
    with pytest.raises(ValueError, match="swap_space must be a positive number of bytes; got -1"):
        PagedConfig(swap_space=-1)


@pytest.mark.usefixtures("always_pays")
def test_blocks_of_a_device_go_to_host_memory_and_no_step_waits_for_it(fake_device, monkeypatch):
    dense, paged = zoo.pair("llama")
    paged = copy.deepcopy(paged).to(fake_device.device)  # The pair is shared by all tests.
    swapping.configure(paged)
    monkeypatch.setattr(swap_space, "_TIMED_EVERY", 10**6)  # The first move alone is timed, and waited for.
    moves, waits, move = [0], [0], SwapSpace.move

    def watched(self, spills, restores):
        with fake_device.watch() as traffic:
            moved = move(self, spills, restores)
        moves[0], waits[0] = moves[0] + 1, waits[0] + traffic.waits
        return moved

    monkeypatch.setattr(SwapSpace, "move", watched)
    for inputs in crowds():
        on_device = {name: tensor.to(fake_device.device) for name, tensor in inputs.items()}
        found = paged.generate(**on_device, **LENGTHS, do_sample=False)
        assert_rows_equal(dense, inputs, dense.generate(**inputs, **LENGTHS, do_sample=False), found.cpu())
    stats = hf_paged.stats(paged)
    assert stats.restored_blocks and stats.packed_calls == len(crowds()) and not stats.gathers
    assert isinstance(engine_of(paged)._swap_space._stores[0], HostStore) and moves[0] > 20
    assert waits[0] == 3, "three looks at the clock in the first move"
