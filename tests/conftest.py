"""Fixtures of every test: unused slots hold NaN, and the pool is whole when a test ends.

Tests of programs whose extra is not installed are left out, with a warning that says so.
"""

import importlib.util
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # A process a core: more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

import hf_paged
from support.pools import poison_new_slots, pools

poison_new_slots()
# A machine that does other things as well is no fault of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)  # After `-m`: what it leaves out needs no warning.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``needs_module(name)`` whose module is missing."""
    for item in list(items):
        missing = [mark.args[0] for mark in item.iter_markers("needs_module") if not _is_installed(mark.args[0])]
        if missing:
            remedy = 'pip install -c constraints.txt -e ".[test,examples]"'
            text = f"{item.name} is deselected: {missing[0]} is not installed: {remedy}"
            warnings.warn(pytest.PytestWarning(text), stacklevel=1)
            config.hook.pytest_deselected(items=[item])
            items.remove(item)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(autouse=True)
def whole_pool():
    """free + cached + used == total after every test, and nothing is left in use. No gc.collect() here."""
    hf_paged.enable()
    yield
    for pool in list(pools):
        pool.check_integrity()
        used = {key: group.blocks.used_blocks for key, group in pool.groups.items()}
        if any(used.values()):
            pools.discard(pool)  # Said once: what holds the blocks may be the traceback of a test that has failed.
            pytest.fail(f"blocks left behind: {used}")


@pytest.fixture(params=[4, None], ids=["block4", "default_block"])
def block_size(request):
    """Block sizes every parity test runs at; None: the default."""
    return request.param


@pytest.fixture
def models(request, block_size):
    """(dense, paged) pair named by the test's parameter, at the block size of the run."""
    from support import zoo

    dense, paged = zoo.pair(request.param)
    config = hf_paged.PagedConfig() if block_size is None else hf_paged.PagedConfig(block_size=block_size)
    hf_paged.configure(paged, config)
    return dense, paged


@pytest.fixture
def rows(monkeypatch):
    """Rows of each step that the engine ran."""
    from support.packing import watch_steps

    return watch_steps(monkeypatch, lambda inputs: len(inputs.sample_index))


@pytest.fixture
def fake_device():
    """Two devices that stand for GPUs, see `support.fake_device`."""
    from support.fake_device import switched_on

    with switched_on() as device:
        yield device
