"""The two contenders of a run, how they are counted, and how their divergences are judged."""

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged_evals.accuracy.generation import first_difference, generate
from hf_paged_evals.accuracy.greedy import GreedyMatch
from hf_paged_evals.accuracy.likelihood import log_likelihoods, split
from hf_paged_evals.accuracy.near_ties import Divergence, judge
from hf_paged_evals.accuracy.windows import losses, windows
from hf_paged_evals.models.pair import ModelPair
from support.tiny_eval import options_for, save_model

PROMPT = [30, 40, 50, 60, 70, 80]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def models(folder):
    return ModelPair(options_for(GreedyMatch(), folder, "unused"))


def test_the_contenders_share_their_weights_and_nothing_else(models):
    for first, second in zip(models.baseline.parameters(), models.backend.parameters()):
        assert first.data_ptr() == second.data_ptr()
    assert [model.config._attn_implementation for model in (models.baseline, models.backend)] == ["sdpa", "paged"]
    assert hf_paged.stats(models.backend).block_size == 4
    assert next(models.exact.parameters()).dtype == torch.float64


def test_only_what_happens_within_is_counted(models):
    generate(models.backend, models.tokenizer, [PROMPT], 1, max_new_tokens=4)
    with models.counting() as counts:
        pass
    assert counts.page_reads == counts.packed_calls == 0 and counts.gathers == counts.fallbacks == {}
    with models.counting() as counts:
        generate(models.backend, models.tokenizer, [PROMPT, PROMPT[:3]], 2, max_new_tokens=4)
    assert counts.page_reads > 0 and counts.packed_calls == 1


def test_pages_hold_what_the_rounding_leaves(folder):
    options = options_for(GreedyMatch(), folder, "unused", kv_dtype="float8_e5m2")
    model = ModelPair(options).backend
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
        model(torch.tensor([[90]]), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            held = held.clone()
            assert torch.equal(held, held.to(torch.float8_e5m2).to(held.dtype)) and held.abs().max() > 0


def test_a_kv_format_is_that_of_the_pages(folder):
    models = ModelPair(options_for(GreedyMatch(), folder, "unused", kv_dtype="int8"))
    for model, format_name in ((models.backend, "int8"), (models.paged_as(kv_dtype="fp8_e4m3"), "fp8_e4m3")):
        generate(model, models.tokenizer, [PROMPT], 1, max_new_tokens=2)
        assert hf_paged.stats(model).kv_formats == (f"{format_name} (full attention)",)


@pytest.mark.parametrize("dtype", ["int16", "float9", "Tensor"])
def test_wrong_dtypes_are_refused(folder, dtype):
    with pytest.raises(
        ValueError, match=f"kv_dtype must be a KV format .* or a floating-point dtype of torch.*got '{dtype}'"
    ):
        _ = ModelPair(options_for(GreedyMatch(), folder, "unused", kv_dtype=dtype)).backend


def test_first_differences():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_a_token_that_rounding_cannot_choose_is_no_near_tie(models):
    with torch.no_grad():
        order = models.exact(torch.tensor([PROMPT])).logits[0, -1].argsort(descending=True).tolist()
    for place in (1, 5):
        found = judge(models, PROMPT, [order[0], 7], [order[place], 7], 0)
        assert found.at == 0 and 0 < found.error < 1e-3 < found.margin <= found.gap and not found.is_near_tie
    assert judge(models, PROMPT, [order[0], 7], [order[0]], 1) is None


def test_an_end_token_that_could_not_be_chosen_makes_no_gap(models, monkeypatch):
    with torch.no_grad():
        logits = models.exact(torch.tensor([PROMPT])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    monkeypatch.setattr(models.baseline.generation_config, "eos_token_id", order[0])
    found = judge(models, PROMPT, [order[1], 7], [order[2], 7], 0)
    assert found.margin == found.gap == float(logits[order[1]] - logits[order[2]])


@pytest.mark.parametrize("gap, is_near_tie", [(0.19, True), (0.21, False)])
def test_near_ties_lie_within_twice_the_error(gap, is_near_tie):
    assert Divergence(at=0, margin=0.1, gap=gap, error=0.1).is_near_tie == is_near_tie


def test_windows_score_each_token_once():
    found = list(windows(list(range(100)), length=32, stride=12))
    scored = [token for window in found for token in window.ids[window.scored :]]
    assert scored == list(range(1, 1 + len(scored))) and len(scored) > 85
    assert all(len(window.ids) == 32 for window in found)


def test_losses_are_those_of_one_forward(models):
    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = list(windows(ids[0].tolist(), 24, 8)) + list(windows(ids[1].tolist(), 24, 8))
    with torch.no_grad():
        exact = -models.exact(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    for model in (models.baseline, models.backend):
        found = torch.stack(losses(model, batch, chunk=8))
        assert torch.allclose(found, exact, atol=1e-4)


def test_likelihoods_are_those_of_whole_texts(models):
    context, choices = split(models.tokenizer, "one and", [" two", " three or four"])
    assert len(choices[0]) == 4 and models.tokenizer.decode(context + choices[1]) == "one and three or four"
    for choice, *found in zip(
        choices, *(log_likelihoods(m, context, choices) for m in (models.baseline, models.backend))
    ):
        ids = torch.tensor([context + choice])
        with torch.no_grad():
            exact = models.exact(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert found == pytest.approx([float(exact[-len(choice) :].sum())] * 2, abs=1e-3)
