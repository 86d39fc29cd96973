"""Calls through transformers' own loop come in when all their blocks are free, and keep them; none waits in vain."""

import threading
import time

import pytest
import torch

import hf_paged
from hf_paged.errors import OutOfBlocksError
from hf_paged.memory import reservation, stall_detector
from hf_paged.models import registry
from support import zoo
from support.packing import LENGTHS, pair
from support.parity import assert_rows_equal
from support.threads import in_threads

BEAMS = {"num_beams": 3, "num_return_sequences": 2}


def only_group(model):
    (group,) = registry.pools_under(model)[0].groups.values()
    return group


@pytest.fixture
def models():
    """A pool of 24 blocks of 4 tokens that exists already."""
    dense, paged = pair(blocks=24)
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    assert hf_paged.stats(paged).total_blocks == 24
    return dense, paged


def test_beams_and_packed_rows_of_other_threads_share_a_pool_within_its_budget(models):
    dense, paged = models
    inputs = [zoo.prompts([9]), zoo.prompts([13, 4, 30, 9]), zoo.prompts([7]), zoo.prompts([21, 1])]
    options = [{**LENGTHS, **(BEAMS if len(prompt["input_ids"]) == 1 else {})} for prompt in inputs]
    expected = [dense.generate(**prompt, **option) for prompt, option in zip(inputs, options)]
    calls = [
        lambda prompt=prompt, option=option: paged.generate(**prompt, **option)
        for prompt, option in zip(inputs, options)
    ]
    for want, got in zip(expected, in_threads(*calls)):
        assert not isinstance(got, Exception), got
        assert torch.equal(want, got)
    assert hf_paged.stats(paged).total_blocks == 24, "the budget was exceeded"
    assert only_group(paged).blocks.reserved == 0


def test_a_call_through_the_own_loop_waits_for_the_rows_that_run(models):
    dense, paged = models
    order, may_go_on = [], threading.Event()

    class Streamer:
        def put(self, tokens):
            if tokens.dim() == 1:  # Not the prompt: the row holds blocks.
                may_go_on.wait(30)

        def end(self):
            order.append("packed")

    def beams():
        while not only_group(paged).blocks.used_blocks:
            time.sleep(0.001)
        threading.Timer(0.2, may_go_on.set).start()
        output = paged.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4)
        order.append("beams")
        return output

    prompt = zoo.prompts([40])
    packed, got = in_threads(lambda: paged.generate(**prompt, **LENGTHS, streamer=Streamer()), beams)
    assert order == ["packed", "beams"]
    assert torch.equal(got, dense.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4))
    assert_rows_equal(dense, prompt, dense.generate(**prompt, **LENGTHS), packed)


def test_a_call_that_needs_more_than_the_pool_has_goes_past_the_budget(models):
    dense, paged = models
    inputs = zoo.prompts([30, 30])
    assert torch.equal(
        paged.generate(**inputs, **LENGTHS, num_beams=4), dense.generate(**inputs, **LENGTHS, num_beams=4)
    )
    assert hf_paged.stats(paged).total_blocks > 24
    assert only_group(paged).blocks.reserved == 0


def test_a_callback_inside_a_call_does_not_wait_for_it(models):
    dense, paged = models
    inner = []

    class Streamer:
        def put(self, tokens):
            if not inner:
                inner.append(paged.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4))

        def end(self):
            pass

    (got,) = in_threads(lambda: paged.generate(**zoo.prompts([40]), **LENGTHS, streamer=Streamer()))
    assert torch.equal(got, dense.generate(**zoo.prompts([40]), **LENGTHS))
    assert torch.equal(inner[0], dense.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4))


def test_no_call_waits_for_one_that_makes_no_progress(models, monkeypatch):
    dense, paged = models
    monkeypatch.setattr(stall_detector, "_PATIENCE", 0.2)
    is_over = threading.Event()

    class Streamer:
        def put(self, tokens):
            if tokens.dim() == 1:  # Not the prompt: the row holds blocks.
                is_over.wait(30)

        def end(self):
            pass

    def beams():
        while not only_group(paged).blocks.used_blocks:
            time.sleep(0.001)
        try:
            return paged.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4)
        finally:
            is_over.set()

    _, got = in_threads(lambda: paged.generate(**zoo.prompts([40]), **LENGTHS, streamer=Streamer()), beams)
    assert torch.equal(got, dense.generate(**zoo.prompts([30]), **LENGTHS, num_beams=4))


def test_what_a_call_frees_stays_promised_to_it(models):
    _, paged = models
    pool, group = registry.pools_under(paged)[0], only_group(paged)
    with reservation.reserve(pool, {group: 20}):
        promised = reservation.of_this_thread()
        with pool.lock, reservation.keeping(group, promised):
            mine = group.allocate_or_grow(18, promised)
            group.blocks.free(mine[5:])
        assert group.blocks.spare_blocks == 4 and group.blocks.reserved == 15
        group.blocks.free(mine[:5])
    assert group.blocks.reserved == 0


def test_a_row_waits_for_the_cache_of_a_call_that_has_just_ended(models, monkeypatch):
    _, paged = models
    monkeypatch.setattr(stall_detector, "_LINGER", 30)
    pool, group = registry.pools_under(paged)[0], only_group(paged)
    with reservation.reserve(pool, {group: 20}), pool.lock:
        mine = group.allocate_or_grow(20, reservation.of_this_thread())
    threading.Timer(0.2, lambda: group.blocks.give_back(mine)).start()
    for options in ({}, {"num_beams": 2}):
        paged.generate(**zoo.prompts([30]), **LENGTHS, **options)
        assert hf_paged.stats(paged).total_blocks == 24


def test_others_cannot_allocate_what_is_reserved(models):
    _, paged = models
    pool, group = registry.pools_under(paged)[0], only_group(paged)
    with reservation.reserve(pool, {group: 20}):
        with pytest.raises(OutOfBlocksError, match="4 are free"):
            group.blocks.allocate(5)
        with pool.lock:
            mine = group.allocate_or_grow(18, reservation.of_this_thread())
        assert group.blocks.spare_blocks == 4 and group.blocks.reserved == 2
        group.blocks.free(mine)
    assert group.blocks.reserved == 0 and group.blocks.spare_blocks == 24
