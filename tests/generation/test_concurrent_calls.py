"""Calls of many threads share steps; each gets its own tokens, errors and streamer."""

import threading
import time

import pytest
import torch

from support import zoo
from support.packing import LENGTHS, SAMPLE, pair, watch_steps
from support.parity import assert_rows_equal
from support.threads import in_threads

pytestmark = pytest.mark.usefixtures("is_ahead")


def test_calls_of_many_threads_run_in_common_steps(monkeypatch):
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([5 + seed, 3], seed=seed) for seed in range(8)]
    options = {**LENGTHS, "min_new_tokens": 20}
    expected = [dense.generate(**inputs, **options) for inputs in prompts]
    paged.generate(**prompts[0], **options)
    rows = watch_steps(monkeypatch, lambda inputs: len(inputs.sample_index))
    results = in_threads(*(lambda inputs=inputs: paged.generate(**inputs, **options) for inputs in prompts))
    for inputs, want, got in zip(prompts, expected, results):
        assert not isinstance(got, Exception), got
        assert_rows_equal(dense, inputs, want, got)
    assert max(rows) > 2, "no two calls ever shared a step"


class Streamer:
    """Collects tokens; does what it is told at the third."""

    def __init__(self, at_third=lambda: None):
        self.tokens, self.ended, self.at_third = [], False, at_third

    def put(self, tokens):
        self.tokens.append(tokens.flatten().tolist())
        if len(self.tokens) == 4:  # The first is the prompt.
            self.at_third()

    def end(self):
        self.ended = True


def test_a_call_that_raises_leaves_the_others_and_the_pool_whole():
    dense, paged = pair(token_budget=64)
    good, bad = zoo.prompts([9, 3]), zoo.prompts([7])
    expected = dense.generate(**good, **LENGTHS)

    def fail():
        raise KeyError("the consumer is gone")

    results = in_threads(
        lambda: paged.generate(**good, **LENGTHS),
        lambda: paged.generate(**bad, **LENGTHS, min_new_tokens=20, streamer=Streamer(fail)),
        lambda: paged.generate(**good, **LENGTHS),
    )
    assert isinstance(results[1], KeyError)
    assert torch.equal(results[0], expected) and torch.equal(results[2], expected)


def test_a_prompt_that_the_model_refuses_fails_its_own_call_only():
    dense, paged = pair(token_budget=64)
    inputs, bad = zoo.prompts([9, 3]), zoo.prompts([7])
    bad["input_ids"][0, 3] = zoo.VOCAB + 400
    expected = dense.generate(**inputs, **LENGTHS)
    good = lambda: paged.generate(**inputs, **LENGTHS)  # noqa: E731
    results = in_threads(good, lambda: paged.generate(**bad, **LENGTHS), good)
    assert isinstance(results[1], IndexError)
    assert torch.equal(results[0], expected) and torch.equal(results[2], expected)


def test_a_slow_streamer_holds_up_its_own_call_only():
    _, paged = pair(token_budget=64)
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    released, options = threading.Event(), {**LENGTHS, "min_new_tokens": 20}
    slow = Streamer(lambda: released.wait(30))

    def quick():
        try:
            while len(slow.tokens) < 4:
                time.sleep(0.01)
            return paged.generate(**zoo.prompts([9, 3]), **options)
        finally:
            released.set()

    results = in_threads(lambda: paged.generate(**zoo.prompts([7]), streamer=slow, **options), quick)
    assert all(isinstance(result, torch.Tensor) for result in results), results
    assert slow.ended and len(slow.tokens) == 21


def test_a_callback_may_call_the_model_again():
    dense, paged = pair()
    inner = []
    streamer = Streamer(lambda: inner.append(paged.generate(**zoo.prompts([5]), **LENGTHS)))
    inputs = zoo.prompts([9])
    assert torch.equal(paged.generate(**inputs, **LENGTHS, streamer=streamer), dense.generate(**inputs, **LENGTHS))
    assert torch.equal(inner[0], dense.generate(**zoo.prompts([5]), **LENGTHS))


def test_unseeded_calls_at_the_same_time_differ():
    _, paged = pair(token_budget=64)
    inputs = zoo.prompts([9])
    options = {**LENGTHS, "min_new_tokens": 20, "do_sample": True}
    results = in_threads(*[lambda: paged.generate(**inputs, **options)] * 4)
    assert len({tuple(result[0].tolist()) for result in results}) == 4


def test_a_seeded_call_in_company_equals_one_alone():
    dense, paged = pair(token_budget=64)
    inputs, started, options = zoo.prompts([9, 4]), threading.Event(), {**LENGTHS, "min_new_tokens": 20}
    torch.manual_seed(5)
    expected = dense.generate(**inputs, **options, **SAMPLE)

    def company():
        started.wait(30)
        return paged.generate(**zoo.prompts([6, 6, 2]), **options)  # Greedy: it draws nothing.

    def seeded():
        torch.manual_seed(5)
        started.set()
        return paged.generate(**inputs, **options, **SAMPLE)

    assert torch.equal(in_threads(seeded, company)[0], expected)
