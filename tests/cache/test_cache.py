"""Paged layers inside transformers' DynamicCache: every method of theirs, against the dense ones."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged.cache.layers import PagedLayer
from support import zoo
from support.caches import (
    as_arguments,
    assert_same_next,
    end_recording,
    every_cache,
    prefill,
    reset,
    step,
    used,
)


@every_cache
def test_layers_are_upstreams_own_subclasses(models):
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=models[1].config)
    assert type(cache) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    assert all(isinstance(layer, PagedLayer) for layer in cache.layers)
    assert all(
        type(layer) is DynamicLayer or layer.is_sliding for layer in DynamicCache(config=models[0].config).layers
    )


@every_cache
@pytest.mark.parametrize("padded", [False, True])
def test_keys_and_values_read_dense(models, padded):
    inputs = zoo.prompts([11, 5] if padded else [11, 11])
    caches = [prefill(model, inputs["input_ids"], inputs["attention_mask"]) for model in models]
    for dense, paged in zip(*(cache.layers for cache in caches), strict=True):
        assert paged.get_seq_length() == dense.get_seq_length() and paged.get_mask_sizes(3) == dense.get_mask_sizes(3)
        for name in ("keys", "values"):
            a, b = getattr(dense, name), getattr(paged, name)
            assert a.shape == b.shape
            tokens = inputs["attention_mask"][:, -a.shape[2] :].bool()
            torch.testing.assert_close(a.transpose(1, 2)[tokens], b.transpose(1, 2)[tokens], atol=2e-5, rtol=1e-4)


@every_cache
@pytest.mark.parametrize("removed", [1, 3, 6])
def test_crop(models, removed):
    ids = zoo.prompts([20, 20])["input_ids"]
    caches = [prefill(model, ids, recording=True) for model in models]
    end_recording(caches)
    for model, cache in zip(models, caches):
        step(model, cache, torch.full((2, 7), 9))
        cache.crop(-removed)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 27 - removed
    assert_same_next(models, caches, 2)
    end_recording(caches)
    assert_same_next(models, caches, 2, positions=4)


@every_cache
def test_crop_says_what_upstream_says(models):
    ids = zoo.prompts([20])["input_ids"]
    messages = []
    for model in models:
        cache = prefill(model, ids)
        for tokens in (3, -2):
            try:
                cache.crop(tokens)
                messages.append("fine")
            except (ValueError, RuntimeError) as error:
                messages.append(str(error))
        del cache
    assert messages[:2] == messages[2:]


@every_cache
def test_reorder_repeat_and_select_copy_tables_only(models):
    paged = models[1]
    hf_paged.release(paged)
    inputs = zoo.prompts([13, 6, 9])
    caches = [prefill(model, **as_arguments(inputs)) for model in models]
    before = used(paged)
    mask = inputs["attention_mask"]

    def all_do(method, argument):
        for cache in caches:
            getattr(cache, method)(argument)
        assert used(paged) <= before, f"{method} copied tokens"

    all_do("reorder_cache", torch.tensor([2, 0, 0]))
    mask = mask[[2, 0, 0]]
    all_do("batch_repeat_interleave", 2)
    mask = mask.repeat_interleave(2, dim=0)
    all_do("batch_select_indices", torch.tensor([5, 0, 1, 3]))
    mask = torch.nn.functional.pad(mask[[5, 0, 1, 3]], (0, 1), value=1)
    assert_same_next(models, caches, 4, mask=mask)
    all_rows = torch.tensor([True, False, True, True])
    for cache in caches:
        cache.batch_select_indices(all_rows)
    mask = torch.nn.functional.pad(mask[all_rows], (0, 1), value=1)
    assert_same_next(models, caches, 3, mask=mask)


@every_cache
def test_rows_that_were_repeated_and_cropped_whole_are_all_stored(models):
    caches = [prefill(model, zoo.prompts([9, 9])["input_ids"][[0, 0]], recording=True) for model in models]
    for cache in caches:
        cache.batch_repeat_interleave(2)
        cache.crop(-9)
    tokens = torch.full((4, 3), 5)
    torch.testing.assert_close(*(step(*each, tokens) for each in zip(models, caches)), atol=2e-4, rtol=1e-4)
    assert_same_next(models, caches, 4)


SELECTIONS = {
    "slice": slice(0, 2),
    "last": slice(-1, None),
    "every_second": slice(None, None, 2),
    "no_slice": slice(0, 0),
    "no_rows": torch.tensor([], dtype=torch.long),
    "mask": torch.tensor([True, False, True]),
    "empty_mask": torch.tensor([False] * 3),
    "mask_of_another_size": torch.tensor([True, False]),
    "negative": torch.tensor([-1, 0]),
    "int32": torch.tensor([2, 0], dtype=torch.int32),
    "list": [2, 0],
    "too_many": torch.tensor([3]),
    "number": 1,
    "floats": torch.tensor([0.0, 1.0]),
}


def told(action) -> type | None:
    """The kind of error that an action ends in."""
    try:
        action()
    except Exception as error:
        return type(error)


def state_of(cache):
    return [
        (layer.keys.shape, layer.values.shape, layer.get_seq_length(), layer.get_mask_sizes(2), layer.is_initialized)
        for layer in cache.layers
    ]


@every_cache
@pytest.mark.parametrize("lone", [False, True], ids=["own", "lone"])
@pytest.mark.parametrize("rows", SELECTIONS.values(), ids=SELECTIONS)
def test_select_takes_whatever_indexes_a_tensor(models, rows, lone):
    ids, caches, errors = zoo.prompts([9, 9, 9])["input_ids"], [], []
    for model in models:
        with torch.no_grad():
            caches.append(model(ids).past_key_values if lone else prefill(model, ids))
        errors.append(told(lambda: caches[-1].batch_select_indices(rows)))
    assert errors[0] is errors[1]
    assert state_of(caches[0]) == state_of(caches[1])
    if len(caches[0].layers[0].keys) and caches[0].layers[0].keys.dim() == 4:
        assert_same_next(models, caches, len(caches[0].layers[0].keys))
        assert all(layer.is_paged for layer in caches[1].layers)


@every_cache
@pytest.mark.parametrize("beams", [[0], [0, 0, 1, 2], [0, 5, 1], [-1, 0, 1], [True, False, True]], ids=str)
def test_reorder_takes_what_index_select_takes(models, beams):
    ids = zoo.prompts([9, 9, 9])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    errors = [told(lambda cache=cache: cache.reorder_cache(torch.tensor(beams))) for cache in caches]
    assert errors[0] is errors[1] and state_of(caches[0]) == state_of(caches[1])
    assert_same_next(models, caches, len(caches[0].layers[0].keys))


@every_cache
@pytest.mark.parametrize("then", [None, "reorder_cache", "batch_repeat_interleave", "deepcopy", "reset"])
def test_a_cache_that_was_cropped_whole_is_empty_and_goes_on(models, then):
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = [prefill(model, ids, recording=True) for model in models]
    for index, cache in enumerate(caches):
        cache.crop(-9)
        if then == "deepcopy":
            caches[index] = copy.deepcopy(cache)
        elif then == "reorder_cache":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif then == "batch_repeat_interleave":
            cache.batch_repeat_interleave(2)
    if then == "reset":
        reset(models, caches)
    else:
        assert caches[1].layers[0].keys.shape == (2, 2, 0, 16)
        assert state_of(caches[0]) == state_of(caches[1])
    assert_same_next(models, caches, 2, positions=3)
    end_recording(caches)
    assert_same_next(models, caches, 2)
    assert all(layer.is_paged for layer in caches[1].layers)


@every_cache
def test_deepcopy_is_independent(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    copies = [copy.deepcopy(cache) for cache in caches]
    for model, other in zip(models, copies):
        step(model, other, torch.full((2, 3), 5))
        other.reorder_cache(torch.tensor([1, 1]))
    assert_same_next(models, caches, 2)
    assert_same_next(models, copies, 2)


@every_cache
def test_reset(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    reset(models, caches)
    assert used(models[1]) == 0 and caches[1].get_seq_length() == 0
    for model, cache in zip(models, caches):  # Another batch size, too.
        step(model, cache, zoo.prompts([6, 6, 6])["input_ids"])
    assert_same_next(models, caches, 3)


@every_cache
@pytest.mark.parametrize("then", [None, "deepcopy", "pickle", "reset"])
def test_pickled_caches_come_back_dense(models, then):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [pickle.loads(pickle.dumps(prefill(model, ids))) for model in models]
    for index, cache in enumerate(caches):
        if then == "deepcopy":
            caches[index] = copy.deepcopy(cache)
        elif then == "pickle":
            caches[index] = pickle.loads(pickle.dumps(cache))
    if then == "reset":
        reset(models, caches)
        for model, cache in zip(models, caches):
            step(model, cache, zoo.prompts([6, 6])["input_ids"])
    assert_same_next(models, caches, 2)
    assert used(models[1]) == 0 and all(layer.is_dense for layer in caches[1].layers)


@every_cache
def test_early_initialization(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [DynamicCache(config=model.config) for model in models]
    for model, cache in zip(models, caches):
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        step(model, cache, ids)
    assert_same_next(models, caches, 2)


@every_cache
def test_assigned_keys_make_a_layer_dense(models):
    """Cache-editing libraries write `layer.keys`; the layer becomes upstream's and stays right."""
    ids = zoo.prompts([6, 6])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    for cache in caches:
        for layer in cache.layers:
            layer.keys = layer.keys * 0.5
    assert used(models[1]) == 0
    assert_same_next(models, caches, 2)
