"""Prepacked weights: packed steps use copies of the linear layers' weights, and nothing else does."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution.prepacked_linear import PrepackedForward, PrepackedLinears, _Copy
from hf_paged.models import registry
from hf_paged.models.fingerprint import fingerprint
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare


def prepacked(name="llama", dtype=torch.float32):
    """Dense and paged models of the test's own; the paged one prepacks."""
    models = tuple(copy.deepcopy(model) for model in zoo.pair(name, dtype))
    hf_paged.configure(models[1], PagedConfig(block_size=4, token_budget=16, prepack_weights=True))
    return models


def copies(model):
    (engine,) = registry.pools_under(model)[0].engines
    return engine.runner.linears._copies


def linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_tokens_equal_dense_with_a_copy_of_every_linear_layer(name, options):
    models = prepacked(name)
    compare(models, zoo.prompts([9, 30, 4]), **options)
    assert set(copies(models[1])) >= {module.weight for module in linears(models[1])}


def test_logits_in_bfloat16_are_those_of_plain_weights():
    _, paged = prepacked(dtype=torch.bfloat16)
    plain = copy.deepcopy(paged)
    hf_paged.configure(plain, PagedConfig(block_size=4, token_budget=16))
    wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1, "pad_token_id": 0}
    got, expected = (model.generate(**zoo.prompts([21]), **wanted).logits[0] for model in (paged, plain))
    assert len(copies(paged)) == len(linears(paged))
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "without a trace"])
def test_changed_weights_are_copied_again(change):
    models = prepacked()
    compare(models, zoo.prompts([9, 4]))
    with torch.no_grad():
        for model in models:
            for number, module in enumerate(linears(model)):
                torch.manual_seed(number)
                weight = module.weight + torch.randn_like(module.weight) / 4
                if change == "in place":
                    module.weight.copy_(weight)
                elif change == "replaced":
                    module.weight = torch.nn.Parameter(weight)
                elif change == "without a trace":  # As fused optimizers do.
                    module.weight.data.copy_(weight)
                else:
                    module.load_state_dict({**module.state_dict(), "weight": weight})
    compare(models, zoo.prompts([9, 4]))
    gc.collect()
    assert len(copies(models[1])) == len(linears(models[1])), "copies of weights that are gone"


def test_nothing_but_packed_steps_uses_the_copies():
    dense, paged = prepacked()
    inputs = zoo.prompts([9])
    compare((dense, paged), inputs)
    with torch.no_grad():
        for weight in copies(paged):
            copies(paged)[weight] = None  # A forward that used them would fail.
        assert torch.equal(paged(**inputs).logits, dense(**inputs).logits)
        beams = {**LENGTHS, "num_beams": 2}
        assert torch.equal(paged.generate(**inputs, **beams), dense.generate(**inputs, **beams))


def call_in_thread(function):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def test_only_the_thread_of_the_step_uses_the_copies():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    inputs, prepacked_linears = torch.randn(4, 8), PrepackedLinears()
    with torch.no_grad():
        expected = model(inputs)
        with prepacked_linears.used_by(model):
            torch.testing.assert_close(model(inputs), expected)
            for weight in prepacked_linears._copies:
                origin = (weight.data_ptr(), weight._version)
                prepacked_linears._copies[weight] = _Copy(torch.empty(0), origin, torch.empty(0))
            with pytest.raises(RuntimeError):
                model(inputs)
            assert torch.equal(call_in_thread(lambda: model(inputs)), expected)
            twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model[0].weight.zero_()
        assert torch.equal(twin(inputs), expected) and torch.equal(loaded(inputs), expected)


def test_layers_get_their_own_forward_back():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].forward = mine = lambda input: input
    with pytest.raises(KeyError), PrepackedLinears().used_by(model):
        assert isinstance(model[0].forward, PrepackedForward)
        assert model[1].forward is mine
        raise KeyError
    assert "forward" not in model[0].__dict__
    assert model[1].forward is mine


def test_a_patched_class_keeps_its_patch(monkeypatch):
    model, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(4, 8)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, input: input + 1)
    with torch.no_grad(), PrepackedLinears().used_by(model):
        assert torch.equal(model(inputs), inputs + 1)


def test_prefixes_are_found_while_another_thread_steps():
    _, paged = prepacked()
    expected = fingerprint(paged, "", [])
    assert expected is not None
    with PrepackedLinears().used_by(paged):
        assert call_in_thread(lambda: fingerprint(paged, "", [])) == expected


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break_and_no_copies():
    dense, paged = prepacked()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = paged.forward
    paged.forward = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    try:
        compare((dense, paged), zoo.prompts([9, 30, 4]))
        assert not copies(paged)
        # Another forward at each step would make a graph for each.
        assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    finally:
        paged.forward = forward
        torch._dynamo.reset()


def test_it_is_off_by_default():
    assert not PagedConfig().prepack_weights
    with pytest.raises(ValueError, match="prepack_weights must be True or False; got 'yes'"):
        PagedConfig(prepack_weights="yes")
