"""Eviction policies: what the pool tells them, what they choose, and how another one is added."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hf_paged
from hf_paged import PagedConfig
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.eviction import EVICTION_POLICIES, LeastRecentlyUsed
from support.packing import BLOCK, compare
from support.policies import MostRecentlyUsed
from support.prefixes import found, own_pair
from support.zoo import prompts


class PoolAgainstLists(RuleBasedStateMachine):
    """Blocks are taken, kept, shared, freed and evicted; the model is the list of cached blocks as they were freed."""

    TOTAL = 6

    @initialize(policy=st.sampled_from([LeastRecentlyUsed, MostRecentlyUsed]), cache_blocks=st.integers(0, TOTAL))
    def begin(self, policy, cache_blocks):
        self.pool = BlockPool(self.TOTAL, 4, cache_blocks, policy())
        self.victim = 0 if policy is LeastRecentlyUsed else -1
        self.owners: list[int] = []  # Used blocks, once for each owner.
        self.kept: set[int] = set()
        self.cached: list[int] = []  # In the order in which they were freed.
        self.evicted: list[int] = []

    def pick(self, blocks, picks):
        return list(dict.fromkeys(blocks[pick % len(blocks)] for pick in picks)) if blocks else []

    @rule(count=st.integers(0, TOTAL))
    def allocate(self, count):
        if count > self.pool.spare_blocks:
            return
        self.evicted.clear()
        taken = self.pool.allocate(count)
        expected = [self.cached.pop(self.victim) for _ in self.evicted]
        assert self.evicted == expected and set(expected) <= set(taken)
        self.kept.difference_update(expected)
        self.owners += taken

    @rule()
    def keep_all(self):
        self.keep(range(self.TOTAL))

    @rule(picks=st.lists(st.integers(0, 99), max_size=3))
    def keep(self, picks):
        for block in self.pick(sorted(set(self.owners) - self.kept), picks):
            self.pool.keep(block, self.evicted.append)
            self.kept.add(block)

    @rule(picks=st.lists(st.integers(0, 99), max_size=5))
    def touch(self, picks):
        blocks = self.pick(sorted({*self.owners, *self.cached}), picks)
        self.pool.touch(blocks)
        self.owners += blocks
        self.cached = [block for block in self.cached if block not in blocks]

    @rule(picks=st.lists(st.integers(0, 99), min_size=2, max_size=6))
    def free(self, picks):
        blocks = self.pick(self.owners, picks)
        self.pool.free(blocks)
        for block in blocks:
            self.owners.remove(block)
            if block in self.kept and block not in self.owners:
                self.cached.append(block)

    @precondition(lambda self: self.kept)
    @rule(pick=st.integers(0, 99))
    def evict(self, pick):
        [block] = self.pick(sorted(self.kept), [pick])
        self.pool.evict(block)
        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @invariant()
    def states_are_those_of_the_lists(self):
        self.pool.check_integrity([self.owners])
        assert self.pool.cached_blocks == len(self.cached)
        assert self.pool.used_blocks == len(set(self.owners))
        assert all(self.pool.is_kept(block) for block in self.kept)


TestPoolAgainstLists = PoolAgainstLists.TestCase
TestPoolAgainstLists.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_policy_from_the_table_decides_what_generate_finds_again(monkeypatch):
    """Ten blocks hold two prompts of four. The third evicts three: the last of the first, or the second's."""
    monkeypatch.setitem(EVICTION_POLICIES, "mru", MostRecentlyUsed)
    first, second, third = (prompts([17], seed=seed) for seed in range(3))
    hits = {}
    for policy in ("lru", "mru"):
        models = own_pair()
        config = PagedConfig(block_size=4, memory_budget=10 * BLOCK, prefix_cache_share=1, eviction_policy=policy)
        hf_paged.configure(models[1], config)
        for prompt in (first, second, third):
            compare(models, prompt, max_new_tokens=2, min_new_tokens=2)
        assert hf_paged.stats(models[1]).evictions and not found(models[1])
        compare(models, first, max_new_tokens=2, min_new_tokens=2)
        hits[policy] = found(models[1])
    assert hits == {"lru": 4, "mru": 16}


@pytest.mark.parametrize("policy", ["lfu", "", None, ["lru"]])
def test_a_policy_that_is_not_in_the_table_is_refused(policy, monkeypatch):
    monkeypatch.setitem(EVICTION_POLICIES, "mru", MostRecentlyUsed)
    assert PagedConfig(eviction_policy="mru").eviction_policy == "mru"
    with pytest.raises(ValueError, match=r"eviction_policy must be one of 'lru', 'mru'; got .*: leave it out for"):
        PagedConfig(eviction_policy=policy)
