"""Absorbed attention in packed steps: which expansions are absorbed, which are not and why, and what pages hold."""

import types

import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution import packed_cache
from hf_paged.execution.latent import Expansion, find_expansion
from hf_paged.models import registry
from hf_paged.reasons import Reason
from support import zoo
from support.parity import assert_rows_equal

NAME = "deepseek_v3"
LENGTHS = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
UNABSORBED = "the model expands latents by a kv_b_proj that attention cannot absorb ({})"


def new_pair(**overrides):
    return tuple(zoo.build(NAME, implementation, **overrides) for implementation in (None, "paged"))


def projections(model):
    return [module.kv_b_proj for module in model.modules() if hasattr(module, "kv_b_proj")]


def check(dense, paged, fallback: str | None = None):
    """Equal tokens, out of latents in pages; or, because of `fallback`, through upstream's loop."""
    inputs = zoo.prompts([11, 4])
    expected, got = (model.generate(**inputs, **LENGTHS) for model in (dense, paged))
    assert_rows_equal(dense, inputs, expected, got)
    stats = hf_paged.stats(paged)
    if fallback is None:
        assert stats.packed_calls and stats.page_reads and not stats.gathers and not stats.fallbacks
    else:
        assert list(stats.fallbacks) == [fallback] and not stats.packed_calls


def test_blocks_hold_latents_and_rope_parts():
    """Of one head, whatever the number of heads: bytes of a token are those of the latent."""
    dense, paged = new_pair()
    check(dense, paged)
    config = paged.config
    (pool,) = registry.pools_under(paged)
    (group,) = pool.groups.values()
    for storage in group.layers.values():
        assert [page.shape[1:] for page in storage.pages] == [
            (1, 16, config.kv_lora_rank),
            (1, 16, config.qk_rope_head_dim),
        ]
        assert storage.block_bytes == 16 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4


@pytest.mark.parametrize(
    "options", [{"capture": "ops"}, {"prepack_weights": True}, {"token_budget": 16, "block_size": 4}], ids=str
)
def test_every_way_to_run_a_step(options):
    dense, paged = new_pair()
    hf_paged.configure(paged, PagedConfig(**options))
    check(dense, paged)
    if "capture" in options:
        stats = hf_paged.stats(paged)
        assert stats.replayed_steps and not stats.dropped_captures


def test_rows_that_begin_attend_to_what_is_expanded_anyhow(monkeypatch):
    """Beside rows with a past, which absorb: together, alone and in chunks."""
    seen = []

    def spy(*arguments):
        metadata, query = arguments[2], arguments[3]
        new_rows = metadata.new_rows
        seen.append((query.shape[2], None if new_rows is None else tuple(new_rows)))
        return attend(*arguments)

    attend = packed_cache._attend_latents
    monkeypatch.setattr(packed_cache, "_attend_latents", spy)
    dense, paged = new_pair()
    hf_paged.configure(paged, PagedConfig(token_budget=16, block_size=4, prefix_cache=False))
    inputs = zoo.prompts([11, 4, 9, 7, 13])
    expected, got = (model.generate(**inputs, **LENGTHS) for model in (dense, paged))
    assert_rows_equal(dense, inputs, expected, got)
    kinds = {"none" if new is None else "all" if new[0] == 0 else "some" for _, new in seen}
    assert kinds == {"none", "all", "some"}
    assert (16, (0, 0, 11)) in seen, seen


@pytest.mark.parametrize("options", [{}, {"capture": "ops"}], ids=str)
def test_weights_that_change_are_absorbed_as_they_are(options):
    dense, paged = new_pair()
    hf_paged.configure(paged, PagedConfig(**options))
    for _ in range(2):
        check(dense, paged)
        for model in (dense, paged):
            with torch.no_grad():
                for projection in projections(model):
                    projection.weight.neg_()
    for model in (dense, paged):
        for projection in projections(model):
            projection.weight = torch.nn.Parameter(projection.weight.detach().roll(1, 0))
    check(dense, paged)


def test_half_precision_is_near_dense():
    dense, paged = (zoo.build(NAME, kind, torch.bfloat16) for kind in (None, "paged"))
    inputs = zoo.prompts([11, 4])
    options = {**LENGTHS, "max_new_tokens": 1, "min_new_tokens": 1, "output_logits": True}
    found = [
        model.generate(**{name: x[row : row + 1, -length:] for name, x in inputs.items()}, **options,
                       return_dict_in_generate=True).logits[0]
        for row, length in enumerate((11, 4)) for model in (dense, paged)
    ]  # fmt: skip
    assert hf_paged.stats(paged).packed_calls == 2
    for expected, got in zip(found[::2], found[1::2]):
        assert (got - expected).abs().max() < 0.06 * expected.abs().max()


class Adapter(torch.nn.Module):
    """A layer around another one, as libraries of adapters put it in place."""

    def __init__(self, base, change):
        super().__init__()
        self.base, self.change = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        with torch.no_grad():
            self.change.weight.copy_(change)

    def forward(self, x):
        return self.base(x) + self.change(x)


def adapt(model):
    for module in model.modules():
        if isinstance(getattr(module, "kv_b_proj", None), torch.nn.Linear):
            module.kv_b_proj = Adapter(module.kv_b_proj, 0.1)


def add_bias(model):
    for projection in projections(model):
        projection.bias = torch.nn.Parameter(torch.full((projection.out_features,), 0.5))


def hook(model):
    for projection in projections(model):
        projection.register_forward_hook(lambda module, args, output: output * 1.001)


def replace_forward(model):
    for projection in projections(model):
        projection.forward = types.MethodType(
            lambda self, x: torch.nn.functional.linear(x, self.weight) * 2, projection
        )


class Subclass(torch.nn.Linear):
    """As quantised layers, it computes in its own way."""

    def forward(self, x):
        return super().forward(x).round(decimals=1)


def subclass(model):
    for projection in projections(model):
        projection.__class__ = Subclass


@pytest.mark.parametrize(
    "change, detail",
    [
        (adapt, "it is a Adapter"),
        (add_bias, "it has a bias"),
        (hook, "its forward is hooked"),
        (replace_forward, "its forward is hooked"),
        (subclass, "it is a Subclass"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_more_than_a_product_is_not_absorbed(change, detail):
    """Before a model's first call, and after it."""
    for first in (False, True):
        dense, paged = new_pair()
        if first:
            check(dense, paged)
            hf_paged.release(paged)
        for model in (dense, paged):
            change(model)
        check(dense, paged, UNABSORBED.format(detail))


def test_an_adapter_of_peft():
    """Beside the weight it is not absorbed; merged into it, it is."""
    import peft

    def adapted(model):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    dense, paged = map(adapted, new_pair())
    inputs = zoo.prompts([11, 4])
    assert_rows_equal(dense, inputs, *(model.generate(**inputs, **LENGTHS) for model in (dense, paged)))
    assert list(hf_paged.stats(paged.get_base_model()).fallbacks) == [UNABSORBED.format("it is a Linear")]
    hf_paged.release(paged.get_base_model())
    check(dense.merge_and_unload(), paged.merge_and_unload())


def expanded(swap=lambda *parts: parts):
    """An attention layer with latents of five tokens, and what it makes of them: arguments of `find_expansion`."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.kv_b_proj = torch.nn.Linear(16, 4 * (6 + 7), bias=False)
    latent, rope = torch.randn(1, 1, 5, 16, generator=generator), torch.randn(1, 1, 5, 8, generator=generator)
    nope, value = module.kv_b_proj(latent[:, 0]).view(1, 5, 4, 13).transpose(1, 2).split((6, 7), 3)
    return module, latent, rope, torch.cat(swap(nope, rope.expand(-1, 4, -1, -1)), 3), value


def test_an_expansion_is_found_and_absorbs():
    module, latent, rope, key, value = expanded()
    found = find_expansion(module, latent, rope, key, value, is_trial=True)
    assert (
        isinstance(found, Expansion) and found.key_weight.shape == (4, 6, 16) and found.value_weight.shape == (4, 7, 16)
    )
    query = torch.randn(4, 5, 14)
    query_latent, query_rope = found.absorb(query)
    scores = torch.einsum("thr,sr->hts", query_latent, latent[0, 0]) + torch.einsum(
        "thr,sr->hts", query_rope, rope[0, 0]
    )
    torch.testing.assert_close(scores, query @ key[0].transpose(1, 2))
    weights = torch.rand(4, 5, 5)
    summed = torch.einsum("hts,sr->thr", weights, latent[0, 0])
    torch.testing.assert_close(found.values_of(summed).transpose(0, 1), weights @ value[0])


@pytest.mark.parametrize("is_trial", [True, False])
def test_another_layout_is_refused_in_the_trial(is_trial):
    """The rope part first: only numbers tell, and later steps trust the trial."""
    arguments = expanded(swap=lambda nope, rope: (rope, nope))
    found = find_expansion(*arguments, is_trial=is_trial)
    assert isinstance(found, Expansion) != is_trial
    if is_trial:
        assert found.text == UNABSORBED.format("it makes other keys and values")


def test_states_that_are_no_latents_keep_their_reason():
    module, latent, rope, key, value = expanded()
    no_projection = torch.nn.Module()
    two_heads = latent.expand(-1, 2, -1, -1)
    for arguments in ((no_projection, latent, rope, key, value), (module, two_heads, rope, key, value)):
        assert find_expansion(*arguments, is_trial=True) is Reason.EARLY_COMPUTATION
    found = find_expansion(module, latent, rope, key[:, :3], value[:, :3], is_trial=True)
    assert found.text == UNABSORBED.format("its weight is [52, 16]")
    found = find_expansion(module.double(), latent, rope, key, value, is_trial=False)
    assert found.text == UNABSORBED.format("its weight is in torch.float64 on cpu")
