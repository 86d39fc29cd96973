"""Runs under faults end with whole pools and right tokens; and what would not handle a fault is found."""

import contextlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged import atomic
from hf_paged.cache import batch_state
from hf_paged.cache.batch_state import GroupRows
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.generation import engine
from hf_paged.memory import reservation
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.sampling.lockstep import Lockstep
from hf_paged.scheduling.prefix_cache import PrefixCache
from hf_paged.scheduling.scheduler import Scheduler
from support import simulator
from support.pools import pools

PART = 60  # Seeds of one test.


def check(seed: int) -> simulator.Run:
    run = simulator.run(seed)
    assert not run.wrong and not run.leaks, f"seed {seed}: {run.wrong} {run.leaks}"
    return run


@pytest.mark.parametrize("first", range(0, 480, PART))
def test_a_fault_costs_the_calls_that_it_hits_and_nothing_else(first):
    fired: Counter[str] = Counter()
    for seed in range(first, first + PART):
        run = check(seed)
        fired[run.plan.fault] += run.fired is not None
    wanted = {"allocation", "device", "forward", "refused", "interrupt", "weights"}
    missing = wanted - {kind for kind in fired if fired[kind]}
    assert not missing, f"never injected: {missing}"


def test_a_swap_space_that_fails_costs_no_call():
    seeds = [seed for seed in range(480) if simulator.Plan.of(seed).fault == simulator.SWAP_FAULT]
    fired = [run.fired for run in map(check, seeds) if run.fired is not None]
    assert {place.split()[0] for place in fired} == {"spill", "restore"} and len(fired) > 10


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(1000, 2**32))
def test_any_seed(seed):
    check(seed)


@pytest.mark.parametrize("seed", [3, 17, 40])
def test_a_run_follows_from_its_seed(seed):
    first, second = check(seed), check(seed)
    assert (first.plan, first.fired) == (second.plan, second.fired)
    assert list(map(str, first.results)) == list(map(str, second.results))


def in_place(section):
    return section()


def tell_only(self, state, error):
    state.error = error
    state.wake()


def go_on_without_copies(self, order, report):
    for number, copies in enumerate(order.planned.copies):
        with contextlib.suppress(torch.OutOfMemoryError):
            self.runner.make_ready(number, copies)
    return order.planned.chunks


def go_on_without_moves(self, order, report):
    self._swap_space.move(order.planned.spills, order.planned.restores)


settle_moves = PrefixCache.settle_moves
MUTATIONS = {
    "an interrupt cuts sections in two": (
        "interrupt",
        [(module, "atomically", in_place) for module in (atomic, engine, reservation, batch_state)],
    ),
    "the sources of copies are never let go": ("none", [(Scheduler, "_let_go", lambda self: None)]),
    "a model that changes keeps its blocks": ("weights", [(PrefixCache, "suspend", lambda self: None)]),
    "a shared block is not copied": ("none", [(KVCacheGroup, "copy_blocks", lambda self, copies: None)]),
    "a shared block of a cache is not copied": ("none", [(GroupRows, "copy_shared_blocks", lambda self: None)]),
    "the rows of a call that failed run on": ("copy", [(engine.Engine, "_fail", tell_only)]),
    "an aborted step's rows keep blocks that were not copied": (
        "interrupted copy",
        [(Scheduler, "abort", lambda self, step: self._let_go())],
    ),
    "a step goes on without the copies that a device refused": (
        "device",
        [(engine.Engine, "_make_ready", go_on_without_copies)],
    ),
    "a step goes on without the blocks that were not restored": (
        simulator.SWAP_FAULT,
        [(engine.Engine, "_move", go_on_without_moves)],
    ),
    "what an interrupted step was to spill is found": (
        "interrupt",
        [(PrefixCache, "settle_moves", lambda self, is_done: settle_moves(self, True))],
    ),
    "criteria are asked ahead of the slowest row": (
        "none",
        [(Lockstep, "_reached", lambda self, counts: max(counts))],
    ),
    "a withdrawn chunk stays in its step": (
        "allocation",
        [(Scheduler, "_withdraw", lambda self, request, step: None)],
    ),
    "a row runs ahead with another token": (
        "none",
        [(PendingTokens, "put_into", lambda self, input_ids, chunks: None)],
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_does_not_handle_a_fault_is_found(mutation, monkeypatch):
    fault, changes = MUTATIONS[mutation]
    for owner, name, value in changes:
        monkeypatch.setattr(owner, name, value)
    for seed in (seed for seed in range(3000) if simulator.Plan.of(seed).fault == fault):
        run = simulator.run(seed)
        if run.wrong or run.leaks:
            pools.discard(run.pool)  # Broken on purpose.
            return
    pytest.fail("no run notices")
