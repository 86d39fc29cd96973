"""Choosing tokens on a device: dense's random numbers, no wait but one a step, and one copy for all calls."""

import contextlib
import copy
import dataclasses
from collections import Counter
from typing import ClassVar

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged.generation.engine import Engine
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.sampling.processors import PROPERTIES, Properties
from support import zoo
from support.fake_device import Traffic
from support.packing import BLOCK, LENGTHS, SAMPLE
from support.places import drawn_by_place
from support.threads import in_threads

WAYS = {"in order": contextlib.nullcontext, "by place": drawn_by_place}
MODES = {
    "greedy": {"do_sample": False},
    "sampled": SAMPLE,
    "top p": {**SAMPLE, "top_p": 0.9, "min_p": 0.01},
    "penalty": {**SAMPLE, "repetition_penalty": 1.3},
    "several": {**SAMPLE, "num_return_sequences": 3},
    "ends": {**SAMPLE, "eos_token_id": list(range(3, 90, 6))},
}


def on(device: torch.device, inputs):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def pair_on(device: torch.device, token_budget: int, blocks: int = 200):
    """The dense model on the CPU, and a copy of the paged one on a device: the pair is shared by all tests."""
    dense, paged = zoo.pair("llama")
    moved = copy.deepcopy(paged).to(device)
    config = hf_paged.PagedConfig(block_size=4, memory_budget=blocks * BLOCK, token_budget=token_budget)
    hf_paged.configure(moved, config)
    return dense, moved


@pytest.fixture
def choosing(fake_device, monkeypatch):
    """The traffic of each step's choosing, reading and accepting."""
    seen: list[Traffic] = []
    choose, read, accept = Engine._choose_for, Engine._read_tokens, GenerateCall.accept

    def add(traffic):
        for field in dataclasses.fields(Traffic):
            setattr(seen[-1], field.name, getattr(seen[-1], field.name) + getattr(traffic, field.name))

    def watched_choose(deliveries, report):
        with fake_device.watch() as traffic:
            choose(deliveries, report)
        seen.append(traffic)

    def watched_accept(self, requests, choice):
        with fake_device.watch() as traffic:
            result = accept(self, requests, choice)
        add(traffic)
        return result

    def watched_read(self, order, report):
        with fake_device.watch() as traffic:
            read(self, order, report)
        add(traffic)

    monkeypatch.setattr(Engine, "_choose_for", staticmethod(watched_choose))
    monkeypatch.setattr(Engine, "_read_tokens", watched_read)
    monkeypatch.setattr(GenerateCall, "accept", watched_accept)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("token_budget", [6, 64])
def test_tokens_and_random_numbers_are_those_of_dense(fake_device, mode, way, token_budget):
    dense, paged = pair_on(fake_device.device, blocks=40, token_budget=token_budget)
    inputs = zoo.prompts([9, 3, 14, 6])
    with WAYS[way]():
        torch.manual_seed(0)
        expected = dense.generate(**inputs, **MODES[mode], **LENGTHS)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        found = paged.generate(**on(fake_device.device, inputs), **MODES[mode], **LENGTHS)
        assert torch.equal(torch.get_rng_state(), state)
    assert found.device == fake_device.device and torch.equal(found.cpu(), expected)
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and not stats.fallbacks


def test_sampled_rows_run_ahead_of_their_tokens(fake_device, monkeypatch):
    dense, paged = pair_on(fake_device.device, token_budget=64)
    inputs, ahead, run_ahead = zoo.prompts([9, 3]), [], Engine._run_ahead
    monkeypatch.setattr(Engine, "_run_ahead", lambda self, unread: ahead.append(unread) or run_ahead(self, unread))
    torch.manual_seed(0)
    expected = dense.generate(**inputs, **SAMPLE, **LENGTHS)
    torch.manual_seed(0)
    found = paged.generate(**on(fake_device.device, inputs), **SAMPLE, **LENGTHS)
    assert torch.equal(found.cpu(), expected) and len(ahead) >= LENGTHS["max_new_tokens"] - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_once_for_the_tokens_of_its_rows(fake_device, choosing, mode):
    _, paged = pair_on(fake_device.device, token_budget=64)
    inputs = on(fake_device.device, zoo.prompts([9, 3, 14, 6]))
    paged.generate(**inputs, **{**MODES[mode], **LENGTHS, "eos_token_id": None})
    choosing.clear()
    paged.generate(**inputs, **{**MODES[mode], **LENGTHS, "eos_token_id": None})
    assert sum(traffic.downloads for traffic in choosing) == LENGTHS["max_new_tokens"]
    for traffic in choosing[1:]:
        assert not traffic.uploads and traffic.downloads <= 1 and traffic.waits <= 1, traffic


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_all_calls_of_a_step_are_read_in_one_copy(fake_device, choosing, mode):
    _, paged = pair_on(fake_device.device, token_budget=64)
    options = {**MODES[mode], **LENGTHS, "eos_token_id": None, "max_new_tokens": 40}
    prompts = [on(fake_device.device, zoo.prompts([length])) for length in range(4, 12)]
    outputs = in_threads(*(lambda one=one: paged.generate(**one, **options) for one in prompts))
    assert [len(tokens[0]) for tokens in outputs] == [length + 40 for length in range(4, 12)]
    assert len(choosing) < 8 * 40, "calls share steps"
    found = Counter((traffic.uploads, traffic.downloads, traffic.waits) for traffic in choosing)
    assert found.most_common(1)[0][0] == (0, 1, 1), "but where the thread of another call copies its prompt"


def test_a_call_that_loses_its_distribution_ends_with_denses_error(fake_device, monkeypatch):
    class Broken(LogitsProcessor):
        calls: ClassVar[list[int]] = []

        def __call__(self, input_ids, scores):
            self.calls.append(len(scores))
            return torch.full_like(scores, float("nan")) if len(self.calls) == 8 else scores

    monkeypatch.setitem(PROPERTIES, Broken, Properties(row_wise=True, token_free=True, cheap=True))
    dense, paged = pair_on(fake_device.device, token_budget=64)
    inputs = zoo.prompts([9, 4])
    broken = LogitsProcessorList([Broken()])
    with pytest.raises(RuntimeError, match="probability tensor"):
        paged.generate(**on(fake_device.device, inputs), **SAMPLE, **LENGTHS, logits_processor=broken)
    torch.manual_seed(0)
    expected = dense.generate(**inputs, **SAMPLE, **LENGTHS)
    torch.manual_seed(0)
    assert torch.equal(paged.generate(**on(fake_device.device, inputs), **SAMPLE, **LENGTHS).cpu(), expected)


def test_a_call_without_a_distribution_does_not_disturb_the_calls_of_its_step(fake_device, monkeypatch):
    class Broken(LogitsProcessor):
        row_wise = True

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, float("nan")) if input_ids.shape[1] > 20 else scores

    monkeypatch.setitem(PROPERTIES, Broken, Properties(row_wise=True, cheap=True))
    dense, paged = pair_on(fake_device.device, token_budget=64)
    options = {**LENGTHS, "eos_token_id": None, "max_new_tokens": 40}
    good, bad = zoo.prompts([9]), on(fake_device.device, zoo.prompts([7]))

    def broken():
        with pytest.raises(RuntimeError, match="probability tensor"):
            paged.generate(**bad, **SAMPLE, **options, logits_processor=LogitsProcessorList([Broken()]))

    _, found = in_threads(broken, lambda: paged.generate(**on(fake_device.device, good), **options))
    assert torch.equal(found.cpu(), dense.generate(**good, **options))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and not stats.fallbacks
