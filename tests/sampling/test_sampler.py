"""Calls that choose their next tokens alike do so in one go, and get what each would get alone."""

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from hf_paged.sampling.next_tokens import NO_TOKEN, NextTokens, check, read
from hf_paged.sampling.sampler import Sampler, sample_together
from support import zoo
from support.packing import LENGTHS, pair
from support.threads import in_threads

CPU = torch.device("cpu")


def sampler(temperature=0.7, top_k=5, do_sample=False):
    return Sampler.of([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)], do_sample, CPU)


def no_noise(probabilities):
    raise AssertionError("the sampler draws numbers of its own")


def test_samplers_are_equal_if_they_choose_alike():
    assert sampler() == sampler() and hash(sampler()) == hash(sampler())
    others = [sampler(temperature=0.8), sampler(top_k=6), sampler(do_sample=True), Sampler.of([], False, CPU)]
    assert len({sampler(), *others}) == 5
    assert Sampler.of([SuppressTokensLogitsProcessor([3])], False, CPU) is None, "tensors are not compared"


def test_calls_choose_together_what_they_would_choose_alone():
    torch.manual_seed(0)
    logits = [torch.randn(rows, 50) for rows in (1, 3, 2, 1, 1)]
    before = [part.clone() for part in logits]
    first, second = sampler(), Sampler.of([], False, CPU)
    chosen = sample_together([first, second, sampler(), None, second], logits, [no_noise] * 5)
    assert chosen[3] is None
    for tokens, part in zip(chosen[:3] + chosen[4:], logits[:3] + logits[4:]):
        assert torch.equal(tokens.ids, part.argmax(-1)) and tokens.is_valid is None
    assert all(map(torch.equal, logits, before))
    alone = read(sample_together([first, second], logits[:2], [no_noise] * 2))
    assert alone == [part.argmax(-1).tolist() for part in logits[:2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_greedy_rows_choose_as_float32_does(dtype):
    logits = torch.zeros(1, 600, dtype=dtype)
    logits[0, 7], logits[0, 500] = 1.0, 1.0 + 1e-12
    assert Sampler.of([], False, CPU).choose(logits).ids.tolist() == logits.float().argmax(-1).tolist() == [7]


def test_sampled_tokens_follow_the_scores():
    torch.manual_seed(0)
    logits = torch.randn(1, 20)
    parts = [logits.expand(3000, -1), logits.expand(1000, -1)]
    chosen = sample_together([sampler(do_sample=True), sampler(do_sample=True)], parts, [no_noise] * 2)
    tokens = torch.cat([part.ids for part in chosen])
    scores = TopKLogitsWarper(5)(None, logits / 0.7).softmax(-1)[0]
    torch.testing.assert_close(tokens.bincount(minlength=20) / 4000, scores, atol=0.03, rtol=0)


def test_a_row_without_a_distribution_is_an_error_of_its_call_alone():
    good, bad = torch.full((2, 20), float("-inf")), torch.full((2, 20), float("nan"))
    good[:, 7], bad[0] = 0.0, 0.0
    first, second, third = read(sample_together([sampler(do_sample=True)] * 3, [good, bad, good], [no_noise] * 3))
    assert first == third == [7, 7] and second[1] == NO_TOKEN != second[0]
    check(first)
    with pytest.raises(RuntimeError, match="probability tensor"):
        check(second)


def test_an_error_that_is_raised_is_told_to_all_that_chose_together():
    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ValueError("no scores")

    failing = [Sampler.of([Failing()], False, CPU)] * 2
    first, second, third = sample_together([*failing, sampler()], [torch.randn(1, 20)] * 3, [no_noise] * 3)
    assert isinstance(first, ValueError) and first is second, "each tries again by itself"
    assert len(third.ids) == 1


def test_tokens_are_read_in_one_copy_for_each_device(monkeypatch):
    copies, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(len(self)) or tolist(self))
    ids = torch.tensor([4, 0, 7, 2, 9])
    several = NextTokens(ids, torch.tensor([True, True, False, True, True])).split([2, 1, 2])
    found = read([*several, NextTokens(ids[:1])])
    assert found == [[4, 0], [NO_TOKEN], [2, 9], [4]]
    assert copies == [6]
    assert read([]) == []


def test_calls_that_choose_together_keep_their_own_noise():
    torch.manual_seed(0)
    processors = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)]
    replaying = Sampler.of(processors, True, CPU, replays=True)
    assert replaying not in (sampler(do_sample=True), sampler())
    logits = [torch.randn(rows, 50) for rows in (1, 3, 2)]
    noise = [torch.empty_like(part).exponential_(1) for part in logits]
    shares = [TopKLogitsWarper(5)(None, part / 0.7).softmax(-1) for part in logits]
    asked = []
    draws = [lambda part, own=own: asked.append(part.shape) or own for own in noise]
    chosen = sample_together([replaying] * 3, logits, draws)
    for tokens, part, own in zip(chosen, shares, noise):
        assert torch.equal(tokens.ids, (part / own).argmax(-1))
    assert asked == [part.shape for part in logits]


def test_greedy_calls_of_several_threads_choose_together(monkeypatch):
    dense, paged = pair()
    rows, choose = [], Sampler.choose
    monkeypatch.setattr(Sampler, "choose", lambda self, logits, noise: rows.append(len(logits)) or choose(self, logits))
    inputs = [zoo.prompts([length]) for length in (9, 14, 5, 11)]
    options = {**LENGTHS, "max_new_tokens": 60, "eos_token_id": None}  # Long enough to meet.
    got = in_threads(*(lambda one=one: paged.generate(**one, **options) for one in inputs))
    for one, tokens in zip(inputs, got):
        assert torch.equal(tokens, dense.generate(**one, **options))
    assert max(rows) > 1
