"""What lives inside transformers' DynamicCache: every method of its layers, against the dense ones."""

import copy
import pickle

import pytest
import torch
import zoo
from transformers import DynamicCache

import hf_paged
from hf_paged.cache import PagedLayer, PagedSlidingWindowLayer

MODELS = ["llama", "mistral", "gemma3_text"]
both = pytest.mark.parametrize("models", MODELS, indirect=True)


def prefill(model, ids, mask=None, recording=False):
    """A cache the caller made and filled: stored at once."""
    cache = DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def step(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def assert_same_next(models, caches, rows, positions=1, mask=None):
    """Both caches continue with the same logits."""
    ids = torch.arange(3, 3 + rows * positions).view(rows, positions) % zoo.VOCAB
    logits = [step(model, cache, ids, mask) for model, cache in zip(models, caches)]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)


def used(model):
    return hf_paged.stats(model).used_blocks


@both
def test_layers_are_upstreams_own_subclasses(models):
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=models[1].config)
    assert type(cache) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    assert all(isinstance(layer, (PagedLayer, PagedSlidingWindowLayer)) for layer in cache.layers)
    assert all(
        type(layer) is DynamicLayer or layer.is_sliding for layer in DynamicCache(config=models[0].config).layers
    )


@both
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


@both
def test_pads_are_not_stored(models):
    hf_paged.release(models[1])
    inputs = zoo.prompts([30, 2, 5])
    cache = prefill(models[1], inputs["input_ids"], inputs["attention_mask"])
    stored = hf_paged.stats(models[1]).tokens_stored
    groups = len({layer.window for layer in cache.layers})
    assert stored <= groups * 37, "37 tokens and 53 pads went in"
    if models[1].config.model_type == "llama":
        assert stored == 37


@both
@pytest.mark.parametrize("removed", [1, 3, 6])
def test_crop(models, removed):
    ids = zoo.prompts([20, 20])["input_ids"]
    caches = [prefill(model, ids, recording=True) for model in models]
    for model, cache in zip(models, caches):
        step(model, cache, torch.full((2, 7), 9))
        cache.crop(-removed)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 27 - removed
    assert_same_next(models, caches, 2)
    assert_same_next(models, caches, 2, positions=4)


@both
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


@both
def test_reorder_repeat_and_select_copy_tables_only(models):
    paged = models[1]
    hf_paged.release(paged)
    inputs = zoo.prompts([13, 6, 9])
    caches = [prefill(model, **_named(inputs)) for model in models]
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


def _named(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


def test_first_divergent_write_copies_one_block():
    paged = zoo.pair("llama")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([10])["input_ids"])
    cache.batch_repeat_interleave(3)
    assert used(paged) == 3
    step(paged, cache, torch.tensor([[5], [6], [7]]))
    assert used(paged) == 5, "two rows copy the last block, the third keeps it"
    del cache
    assert used(paged) == 0


@both
def test_deepcopy_is_independent(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    twins = [copy.deepcopy(cache) for cache in caches]
    for model, twin in zip(models, twins):
        step(model, twin, torch.full((2, 3), 5))
        twin.reorder_cache(torch.tensor([1, 1]))
    assert_same_next(models, caches, 2)
    assert_same_next(models, twins, 2)


@both
def test_reset(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    for cache in caches:
        cache.reset()
    assert used(models[1]) == 0 and caches[1].get_seq_length() == 0
    for model, cache in zip(models, caches):  # Another batch size, too.
        step(model, cache, zoo.prompts([6, 6, 6])["input_ids"])
    assert_same_next(models, caches, 3)


@both
def test_pickled_caches_come_back_dense(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    caches[1] = pickle.loads(pickle.dumps(caches[1]))
    assert used(models[1]) == 0
    assert_same_next(models, caches, 2)


@both
def test_early_initialization(models):
    ids = zoo.prompts([10, 10])["input_ids"]
    caches = [DynamicCache(config=model.config) for model in models]
    for model, cache in zip(models, caches):
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        step(model, cache, ids)
    assert_same_next(models, caches, 2)


@both
def test_assigned_keys_make_a_layer_dense(models):
    """Cache-editing libraries write `layer.keys`; the layer becomes upstream's and stays right."""
    ids = zoo.prompts([6, 6])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    for cache in caches:
        for layer in cache.layers:
            layer.keys = layer.keys * 0.5
    assert used(models[1]) == 0
    assert_same_next(models, caches, 2)


def test_blocks_that_left_the_window_are_freed():
    paged = zoo.pair("mistral")[1]  # Window of 7.
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([50])["input_ids"])
    assert used(paged) <= 3, "of a long prompt only the window is stored"
    for _ in range(30):
        step(paged, cache, torch.tensor([[5]]))
        assert used(paged) <= 3
    del cache


def test_recorded_past_keeps_blocks_until_crop():
    paged = zoo.pair("mistral")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    cache = prefill(paged, zoo.prompts([50])["input_ids"], recording=True)
    assert used(paged) == 13
    cache.crop(0)
    assert used(paged) <= 3
    del cache


def test_equal_rows_are_stored_once():
    paged = zoo.pair("llama")[1]
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4))
    row = zoo.prompts([12])["input_ids"]
    other = row.clone()
    other[0, 3] += 1
    cache = prefill(paged, torch.cat([row, other, row, row]))
    assert used(paged) == 6, "two different prompts of three blocks"
    del cache


def test_rows_with_the_same_tokens_and_other_padding_are_told_apart():
    from hf_paged.twins import same_rows

    ids = torch.ones(3, 4, dtype=torch.long)
    valid = torch.ones(3, 4, dtype=torch.bool)
    assert same_rows(ids, None) == same_rows(ids, valid) == [0, 0, 0]
    valid[1, 0] = False
    assert same_rows(ids, valid) == [0, 1, 0]
    assert same_rows(torch.arange(12).view(3, 4), None) is None


@pytest.mark.parametrize("models", MODELS, indirect=True)
def test_rows_that_differ_below_the_tokens_are_parted(models):
    """Rows of one prompt run under different adapters: the first layers agree, the next do not."""
    hf_paged.release(models[1])
    ids = zoo.prompts([10])["input_ids"].expand(4, -1)

    def adapt(module, args, output):
        return output + torch.tensor([0.0, 1.0, 0.0, 2.0])[: len(output), None, None]

    hooks = [model.model.layers[0].mlp.register_forward_hook(adapt) for model in models]
    try:
        caches = [prefill(model, ids) for model in models]
        assert_same_next(models, caches, 4)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_lone_forward_stores_nothing_until_its_cache_is_used():
    dense, paged = zoo.pair("llama")
    hf_paged.release(paged)
    ids = zoo.prompts([12, 12])["input_ids"]
    with torch.no_grad():
        outputs = [model(ids) for model in (dense, paged)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert used(paged) == 0
    caches = [output.past_key_values for output in outputs]
    del outputs
    assert caches[1].get_seq_length() == 12
    assert_same_next((dense, paged), caches, 2)
    assert used(paged) > 0
    stats = hf_paged.stats(paged)
    assert stats.page_reads > 0 and not stats.gathers


@pytest.mark.parametrize("use", ["reorder_cache", "batch_repeat_interleave", "crop", "deepcopy"])
def test_the_cache_of_a_lone_forward_can_be_used_like_any(use):
    models = zoo.pair("gemma3_text")
    ids = zoo.prompts([5, 5])["input_ids"]
    caches = []
    for model in models:
        with torch.no_grad():
            cache = model(ids).past_key_values
        if use == "deepcopy":
            cache = copy.deepcopy(cache)
        else:
            getattr(cache, use)({"reorder_cache": torch.tensor([1, 0]), "batch_repeat_interleave": 1, "crop": -2}[use])
        caches.append(cache)
    assert_same_next(models, caches, 2)


def test_two_models_of_one_config_have_two_pools():
    config = zoo.build("llama", "paged").config
    from transformers import LlamaForCausalLM

    first, second = (LlamaForCausalLM(config).eval() for _ in range(2))
    cache = prefill(first, zoo.prompts([9])["input_ids"])
    assert used(first) > 0 and hf_paged.stats(second).total_blocks == 0
    del cache


def test_a_copied_model_pages_on_its_own():
    model = zoo.build("llama", "paged")
    twin = copy.deepcopy(model)
    cache = prefill(twin, zoo.prompts([9])["input_ids"])
    assert used(twin) > 0 and hf_paged.stats(model).total_blocks == 0
    del cache


def test_other_batch_size_is_refused_in_words():
    paged = zoo.pair("llama")[1]
    cache = prefill(paged, zoo.prompts([9, 9])["input_ids"])
    with pytest.raises(ValueError, match="holds 2 rows and got states for 3"):
        step(paged, cache, torch.full((3, 1), 5))
    del cache


def test_unseen_padding_that_is_shown_later_is_refused_in_words():
    paged = zoo.pair("llama")[1]
    inputs = zoo.prompts([9, 4])
    cache = prefill(paged, **_named(inputs))
    with pytest.raises(hf_paged.UnsupportedError, match="attention_mask of the whole sequence"):
        step(paged, cache, torch.full((2, 1), 5))
    del cache


def test_a_mask_that_hides_stored_tokens_is_obeyed():
    models = zoo.pair("llama")
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 2:6] = 0
    assert_same_next(models, caches, 2, mask=mask)
    assert "the attention mask hides stored tokens" in hf_paged.stats(models[1]).gathers


def test_autocast_after_float32_goes_dense():
    models = zoo.pair("llama")
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = [prefill(model, ids) for model in models]
    logits = []
    for model, cache in zip(models, caches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(step(model, cache, torch.full((2, 1), 5)).float())
    torch.testing.assert_close(*logits, atol=0.3, rtol=0.1)
    assert used(models[1]) == 0


def test_inference_mode_and_after():
    models = zoo.pair("llama")
    hf_paged.release(models[1])
    ids = zoo.prompts([9, 9])["input_ids"]
    caches = []
    for model in models:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        caches.append(cache)
    assert_same_next(models, caches, 2)


def test_stale_handles_refuse_to_be_read():
    paged = zoo.pair("llama")[1]
    cache = prefill(paged, zoo.prompts([9])["input_ids"])
    kept = []

    def keep(module, args, kwargs):
        kept.append(kwargs)

    original = PagedLayer.update
    handles = []

    def update(self, *args, **kwargs):
        handles.append(original(self, *args, **kwargs))
        return handles[-1]

    PagedLayer.update = update
    try:
        step(paged, cache, torch.tensor([[5]]))
    finally:
        PagedLayer.update = original
    keys, _ = handles[0]
    assert keys.shape == (1, 2, 10, 16) and keys.sum().isfinite()
    step(paged, cache, torch.tensor([[6]]))
    with pytest.raises(RuntimeError, match="after the cache has changed"):
        keys + 1
    handles.clear()
    del keys, cache, _
