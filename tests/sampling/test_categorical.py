"""Choosing in two levels chooses what one level would."""

import pytest
import torch

from hf_paged.sampling import categorical

VOCABULARIES = [1, 6, 97, 256, 300, 640, 1000]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_argmax_is_that_of_torch(vocab):
    torch.manual_seed(vocab)
    scores = torch.randn(200, vocab)
    scores[50:100] = scores[50:100].round()  # Many ties: the first one counts.
    scores[100:150, torch.randperm(vocab)[: vocab - 1]] = float("-inf")
    scores[150] = float("-inf")
    scores[151, vocab // 2] = float("nan")
    scores[152] = 0.0
    assert torch.equal(categorical.argmax(scores), scores.argmax(-1))


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_samples_follow_the_distribution(vocab):
    torch.manual_seed(vocab)
    shares = torch.zeros(vocab)
    some = torch.randperm(vocab)[:5]
    shares[some] = torch.rand(len(some)) + 0.1
    shares /= shares.sum()
    tokens = categorical.sample(shares.expand(20_000, -1)).ids
    found = tokens.bincount(minlength=vocab) / len(tokens)
    torch.testing.assert_close(found, shares, atol=0.02, rtol=0)
    assert not found[shares == 0].any()


def test_each_row_is_sampled_from_its_own_shares():
    tokens = torch.tensor([0, 255, 256, 511, 599])
    assert torch.equal(categorical.sample(torch.eye(600)[tokens]).ids, tokens)


@pytest.mark.parametrize("at", ["least", "most"])
def test_the_least_and_the_largest_random_number_sample_tokens_with_a_share(at, monkeypatch):
    shares = torch.zeros(3, 600)
    shares[0, [3, 590]], shares[1, [255, 256]], shares[2, [7, 8]] = 1 / 3, 1e-30, 0.1
    end = 0.0 if at == "least" else 1 - 2**-53
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, end, **options))
    assert categorical.sample(shares).ids.tolist() == ([3, 255, 7] if at == "least" else [590, 256, 8])


@pytest.mark.parametrize("vocab", [300, 512])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_row_that_is_no_distribution_is_told_of_and_gets_a_token(bad, vocab):
    shares = torch.full((3, vocab), 1 / vocab)
    shares[1] = bad
    tokens = categorical.sample(shares)
    assert tokens.is_valid.tolist() == [True, False, True]
    assert 0 <= tokens.ids.min() and tokens.ids.max() < vocab, "the model can run on it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_given_noise_samples_what_multinomial_samples(dtype):
    shares = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)).softmax(-1).to(dtype)
    shares[:, 5] = 0.0
    expected = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    noise = torch.empty_like(shares).exponential_(1, generator=torch.Generator().manual_seed(1))
    tokens = categorical.sample_with(shares.clone(), noise)
    assert torch.equal(tokens.ids, expected) and tokens.is_valid.all()
    shares[3] = float("nan")
    tokens = categorical.sample_with(shares.clone(), noise)
    assert not tokens.is_valid[3] and tokens.is_valid.sum() == 49
