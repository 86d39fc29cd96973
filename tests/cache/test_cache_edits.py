"""Edits in place of what a cache hands out: they change the cache where they would change a dense one."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from support import zoo
from support.caches import assert_same_next, every_cache, prefill, step


def add_to_last(layer):
    layer.values[:, :, -1] += 3


def scale(layer):
    layer.keys.mul_(0.2)


def write_some(layer):
    layer.values[0, :, 2:4] = 1.5


def copy_over(layer):
    layer.keys.copy_(layer.keys.flip(2))


def zero(layer):
    layer.values.zero_()


def edit_a_view(layer):
    last = layer.keys[..., -3:, :].transpose(1, 2)
    last.sub_(1)


def edit_without_grad(layer):
    with torch.no_grad():
        layer.keys[:] = layer.keys * 0.5


def edit_in_inference_mode(layer):
    with torch.inference_mode():
        keys = layer.keys
    keys *= 0.5


def edit_data(layer):
    layer.values.data[:, 0] = 0


def edit_in_numpy(layer):
    layer.values.numpy()[:, 0] *= -1


def edit_both(layer):
    keys, values = layer.keys, layer.values
    keys[1] = keys[0] * 0.3
    values.add_(keys)


EDITS = [
    add_to_last,
    scale,
    write_some,
    copy_over,
    zero,
    edit_a_view,
    edit_without_grad,
    edit_in_inference_mode,
    edit_data,
    edit_in_numpy,
    edit_both,
]
every_edit = pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])


def filled(models, seed=0):
    ids = zoo.prompts([11, 11], seed)["input_ids"]
    return [prefill(model, ids) for model in models]


@every_cache
@every_edit
def test_an_edit_changes_the_cache(models, edit):
    caches, token = filled(models), torch.full((2, 1), 5)
    before = step(models[0], copy.deepcopy(caches[0]), token)
    for cache in caches:
        for layer in cache.layers:
            edit(layer)
    assert (step(models[0], copy.deepcopy(caches[0]), token) - before).abs().max() > 1e-2, "the edit changes nothing"
    for dense, paged in zip(*(cache.layers for cache in caches)):
        torch.testing.assert_close(dense.keys, paged.keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(dense.values, paged.values, atol=2e-4, rtol=1e-4)
    assert_same_next(models, caches, 2)
    assert_same_next(models, caches, 2, positions=3)


@every_cache
@pytest.mark.parametrize("layer", [0, 1])
def test_generate_goes_on_from_an_edited_cache(models, layer):
    outputs = []
    ids = zoo.prompts([11], 0)["input_ids"]
    for model in models:
        cache = prefill(model, ids)
        add_to_last(cache.layers[layer])
        scale(cache.layers[layer])
        more = torch.cat([ids, ids[:, :5]], 1)
        outputs.append(model.generate(more, past_key_values=cache, do_sample=False, max_new_tokens=8))
    assert torch.equal(*outputs)
    del cache


@every_cache
@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: copy.deepcopy(cache),
        lambda cache: pickle.loads(pickle.dumps(cache)),
        lambda cache: cache.get_mask_sizes(1, 0) and None,
    ],
    ids=["reorder", "repeat", "select", "deepcopy", "pickle", "mask_sizes"],
)
def test_whatever_uses_the_cache_next_finds_the_edit(models, use):
    caches = filled(models)
    for index, cache in enumerate(caches):
        for layer in cache.layers:
            scale(layer)
        caches[index] = use(cache) or cache
    assert_same_next(models, caches, 2)


@every_cache
def test_what_is_only_read_stays_in_pages(models):
    caches = filled(models)
    for cache in caches:
        for layer in cache.layers:
            assert layer.keys.sum().isfinite() and layer.values.sum().isfinite()
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 0]))
    caches = copy.deepcopy(caches)
    assert_same_next(models, caches, 2)
    assert all(layer.is_paged for layer in caches[1].layers)


@every_cache
def test_what_was_never_read_is_not_compared(models):
    hf_paged.release(models[1])
    caches = filled(models)
    assert_same_next(models, caches, 2)
    assert not hf_paged.stats(models[1]).gathers


@every_cache
def test_a_tensor_from_before_an_update_is_the_caches_no_longer(models):
    caches = filled(models)
    old = [[layer.keys for layer in cache.layers] for cache in caches]
    assert_same_next(models, caches, 2)
    for tensors in old:
        for tensor in tensors:
            tensor.zero_()
    assert_same_next(models, caches, 2)
    assert all(layer.is_paged for layer in caches[1].layers)


@every_cache
@pytest.mark.parametrize("removed", [0, 2])
def test_a_tensor_from_before_a_crop_is_the_caches_still(models, removed):
    ids = zoo.prompts([20, 20])["input_ids"]
    caches = [prefill(model, ids, recording=True) for model in models]
    for cache in caches:
        old = [layer.values for layer in cache.layers]
        cache.crop(-removed)
        for tensor in old:
            tensor[:, :, -4:] *= 0.1
    del old
    assert_same_next(models, caches, 2)


@every_cache
def test_an_edit_changes_one_of_the_caches_that_share_blocks(models):
    caches = filled(models)
    copies = copy.deepcopy(caches)
    for cache in caches:
        for layer in cache.layers:
            add_to_last(layer)
    assert_same_next(models, copies, 2)
    assert_same_next(models, caches, 2)


def test_an_edit_changes_one_of_the_rows_that_share_blocks():
    models = zoo.pair("llama")
    ids = zoo.prompts([12])["input_ids"].repeat(2, 1)
    caches = [prefill(model, ids) for model in models]
    for cache in caches:
        cache.layers[0].keys[1] *= 0.3
    assert_same_next(models, caches, 2)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("is_copied", [False, True])
def test_states_of_a_lone_forward(name, is_copied):
    models = zoo.pair(name)
    ids = zoo.prompts([12, 12])["input_ids"]
    caches = []
    for model in models:
        with torch.no_grad():
            cache = model(ids).past_key_values
        other = copy.deepcopy(cache)
        for layer in cache.layers:
            add_to_last(layer)
            scale(layer)
        caches.append(other if is_copied else cache)
    for dense, paged in zip(*(cache.layers for cache in caches)):
        torch.testing.assert_close(dense.keys, paged.keys, atol=2e-4, rtol=1e-4)
    assert_same_next(models, caches, 2)


@pytest.mark.parametrize("in_forward", [False, True])
def test_keys_of_cross_attention(in_forward):
    """Inside a forward a reader gets a handle, which is as good."""
    models = [zoo.build_encoder_decoder("bart", implementation) for implementation in ("sdpa", "paged")]
    inputs, tokens = zoo.prompts([11, 11]), torch.tensor([[5], [7]])
    results = []
    for model in models:
        output = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
        cache = output.past_key_values

        def edit(*_, cache=cache):
            scale(cache.cross_attention_cache.layers[0])
            add_to_last(cache.cross_attention_cache.layers[0])

        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)
            hook = model.model.decoder.layers[0].register_forward_pre_hook(edit) if in_forward else edit()
            for _ in range(2):
                logits = model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache).logits
                if hook is not None:
                    hook.remove()
        results.append(logits)
        del cache, output, edit
    torch.testing.assert_close(*results, atol=2e-4, rtol=1e-4)


@every_cache
def test_a_model_that_writes_into_what_update_returned(models, monkeypatch):
    def editing(update):
        def edited(self, *args, **kwargs):
            keys, values = update(self, *args, **kwargs)
            values[:, :, -1] += 3
            return keys, values

        return edited

    caches = filled(models)
    with monkeypatch.context() as patch:
        patch.setattr(DynamicCache, "update", editing(DynamicCache.update))
        assert_same_next(models, caches, 2)
        assert_same_next(models, caches, 2, positions=2)
    assert_same_next(models, caches, 2)
    assert not any(layer.is_paged for layer in caches[1].layers)
