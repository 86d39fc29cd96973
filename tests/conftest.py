"""Fixtures of every test: unused slots hold NaN, and the pool is whole when a test ends."""

import os
import weakref

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # A process a core: more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import hf_paged
from hf_paged import engine
from hf_paged.kv_pool import GroupPool, KVPool

_pools: "weakref.WeakSet[KVPool]" = weakref.WeakSet()


def _poison_new_slots() -> None:
    """Fill slots with NaN whenever they are handed out, so that a read past the context shows."""
    group_init, layer, init = GroupPool.__init__, GroupPool.layer, KVPool.__init__

    def poisoned_init(self, *args):
        group_init(self, *args)
        allocate = self.blocks.allocate

        def poisoned_allocate(num_blocks):
            blocks = allocate(num_blocks)
            with torch.no_grad():
                for storage in self.layers.values():
                    storage.ensure(self.blocks.high_water)
                    for cache in (storage.key_cache, storage.value_cache):
                        cache[torch.tensor(blocks, dtype=torch.long)] = float("nan")
            return blocks

        self.blocks.allocate = poisoned_allocate

    def poisoned_layer(self, index, key, value):
        is_new = index not in self.layers
        storage = layer(self, index, key, value)
        if is_new:
            storage.ensure(self.blocks.high_water)
            for cache in (storage.key_cache, storage.value_cache):
                cache[: self.blocks.high_water] = float("nan")
        return storage

    def tracked_init(self, config):
        init(self, config)
        _pools.add(self)

    GroupPool.__init__, GroupPool.layer, KVPool.__init__ = poisoned_init, poisoned_layer, tracked_init


_poison_new_slots()


@pytest.fixture(autouse=True)
def whole_pool():
    """free + cached + used == total after every test, and nothing is left in use. No gc.collect() here."""
    hf_paged.enable()
    yield
    for pool in list(_pools):
        pool.check_integrity()
        used = {key: group.blocks.used_blocks for key, group in pool.groups.items()}
        assert not any(used.values()), f"blocks left behind: {used}"


@pytest.fixture(params=[4, None], ids=["block4", "default_block"])
def block_size(request):
    """Block sizes every parity test runs at; None: the default."""
    return request.param


@pytest.fixture
def models(request, block_size):
    """(dense, paged) pair named by the test's parameter, at the block size of the run."""
    import zoo

    dense, paged = zoo.pair(request.param)
    config = hf_paged.PagedConfig() if block_size is None else hf_paged.PagedConfig(block_size=block_size)
    hf_paged.configure(paged, config)
    return dense, paged


@pytest.fixture
def rows(monkeypatch):
    """Rows of each step that the engine ran."""
    seen = []
    run_step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda model, step: (seen.append(len(step.sample_index)), run_step(model, step))[1]
    )
    return seen
