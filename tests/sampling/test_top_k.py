"""Top-k first gives the shares that it gives in its place, without the rest of the vocabulary."""

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_paged.sampling.processors import apply_token_free
from hf_paged.sampling.sampler import Sampler
from hf_paged.sampling.top_k import keep_top_k, split_at_top_k

VOCAB = 2000


def kept(processors, logits):
    """(tokens, scores after all processors) of what top-k leaves, and None if the vocabulary is not cut."""
    split = split_at_top_k(processors)
    found = None if split is None else keep_top_k(split, logits)
    return None if found is None else (found[0], apply_token_free(split.after, found[1]))


AFTER = {
    "nothing": [],
    "top p": [TopPLogitsWarper(0.8)],
    "min p": [MinPLogitsWarper(0.1)],
    "typical": [TypicalLogitsWarper(0.9)],
    "temperature": [TemperatureLogitsWarper(0.5)],
    "top k": [TopKLogitsWarper(3)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("temperature", [None, 0.6, 1.7])
def test_shares_are_those_of_the_whole_vocabulary(temperature, after, dtype):
    torch.manual_seed(0)
    before = [] if temperature is None else [TemperatureLogitsWarper(temperature)]
    processors = [*before, TopKLogitsWarper(20), *AFTER[after]]
    logits = torch.randn(30, VOCAB).to(dtype) * 3
    tokens, scores = kept(processors, logits)
    shares = torch.zeros(30, VOCAB).scatter(1, tokens, scores.softmax(-1))
    expected = LogitsProcessorList(processors)(None, logits.float()).softmax(-1)
    # Which of some equally likely tokens top-p cuts off is left open.
    torch.testing.assert_close(shares.sort().values, expected.sort().values, atol=1e-6, rtol=1e-5)
    differing = (shares - expected).abs() > 1e-6
    edges = torch.where(expected > 0, expected, 1.0).amin(-1, keepdim=True)
    assert torch.isclose(torch.maximum(shares, expected), edges, rtol=1e-5)[differing].all()


def test_tokens_as_likely_as_the_last_all_count():
    """Top-k keeps every token that equals its k-th; where some of them might be lost, nothing is cut."""
    logits = torch.zeros(2, VOCAB)
    logits[:, :5] = 1.0
    assert kept([TopKLogitsWarper(8)], logits) is None
    logits[:, 100:109] = 0.5
    tokens, scores = kept([TopKLogitsWarper(8)], logits)
    left = tokens[scores > -float("inf")].view(2, -1).sort().values
    assert left.tolist() == [[*range(5), *range(100, 109)]] * 2
    logits[1] = 0.0
    assert kept([TopKLogitsWarper(8)], logits) is None, "one row is enough"


@pytest.mark.parametrize(
    "processors",
    [
        [TopPLogitsWarper(0.9)],
        [TopPLogitsWarper(0.9), TopKLogitsWarper(8)],
        [TopKLogitsWarper(8, filter_value=-100.0)],
        [TopKLogitsWarper(VOCAB // 2)],
        [],
    ],
    ids=["no top k", "top p first", "others keep a share", "most of the vocabulary", "none"],
)
def test_what_needs_the_whole_vocabulary_gets_it(processors):
    assert kept(processors, torch.randn(2, VOCAB)) is None


def test_tokens_sampled_after_top_k_follow_the_scores():
    torch.manual_seed(1)
    sampler = Sampler.of([TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)], True, torch.device("cpu"))
    logits = torch.randn(1, VOCAB)
    found = sampler.choose(logits.expand(4000, -1)).ids.bincount(minlength=VOCAB) / 4000
    expected = TopKLogitsWarper(5)(None, logits / 0.7).softmax(-1)[0]
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert not found[expected == 0].any()
