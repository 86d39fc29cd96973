"""Pools that are too small, with a swap space to which every block goes that makes room."""

import pytest

import hf_paged
from hf_paged import PagedConfig
from hf_paged.memory.swap_costs import SwapCosts
from support.packing import BLOCK
from support.prefixes import prompts

ROWS = [13, 14, 30, 19, 21, 11] * 2


def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have blocks moved whatever it costs: what is measured here says nothing of a model that is no toy."""
    monkeypatch.setattr(SwapCosts, "_pays", lambda self, seconds_per_byte: True)


def configure(model, blocks: int = 22, swap_blocks: int | None = 400) -> None:
    """Page a model with pools of so many blocks of 4 tokens; the swap space has bytes for as many."""
    swap_space = None if swap_blocks is None else swap_blocks * BLOCK
    config = PagedConfig(block_size=4, memory_budget=blocks * BLOCK, token_budget=16, swap_space=swap_space)
    hf_paged.configure(model, config)


def crowds(rounds: int = 2):
    """The inputs of calls, each of more rows than the pool holds; the last ones are the first ones again."""
    return [prompts(ROWS, shared=10, seed=seed) for seed in (*range(rounds), *range(rounds))]
