"""The public surface: config, configure, stats, release, budgets, and what a failing call leaves behind."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

import hf_paged
from hf_paged import PagedConfig
from hf_paged.memory.kv_format import BlockShape, NativeFormat
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.memory.sizing import budget_bytes
from support import zoo


def test_config_is_frozen_and_has_defaults():
    config = PagedConfig()
    assert config.block_size == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 16


@pytest.mark.parametrize("size", [0, 2, 3, 24, -16, 16.0, "16", True])
def test_wrong_block_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"block_size must be a power of two, at least 4; got .*: try"):
        PagedConfig(block_size=size)


def test_a_block_that_no_machine_holds_is_refused():
    assert PagedConfig(block_size=2**16).block_size == 2**16
    with pytest.raises(ValueError, match="block_size must be at most 65536; got 1180591620717411303424: try 16"):
        PagedConfig(block_size=2**70)


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "half", float("nan")])
def test_wrong_shares_are_refused(share):
    with pytest.raises(ValueError, match="prefix_cache_share must be a number from 0 to 1; got .*: try 0.125"):
        PagedConfig(prefix_cache_share=share)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "much", "12 parsec", True])
def test_wrong_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="memory_budget must be"):
        PagedConfig(memory_budget=budget)


@pytest.mark.parametrize("budget, expected", [(1024, 1024), ("1.5KiB", 1536), ("2 MB", 2 * 10**6), ("1gib", 2**30)])
def test_budgets_are_understood(budget, expected):
    assert budget_bytes(PagedConfig(memory_budget=budget), torch.device("cpu")) == expected


def test_the_default_budget_is_modest():
    import psutil

    assert budget_bytes(PagedConfig(), torch.device("cpu")) <= psutil.virtual_memory().total / 4


def test_configure_wants_a_config():
    with pytest.raises(TypeError, match="takes a PagedConfig, got dict"):
        hf_paged.configure(zoo.pair("llama")[1], {"block_size": 16})


@pytest.mark.parametrize("call", [hf_paged.stats, hf_paged.release, lambda it: hf_paged.configure(it, PagedConfig())])
def test_what_is_no_model_is_refused_in_words(call):
    with pytest.raises(TypeError, match="expected a model, got str: pass the model itself"):
        call("gpt2")


@pytest.mark.parametrize("arguments", [["--new-tokens", "0"], ["--block-size", "5"]], ids=str)
def test_the_demo_refuses_wrong_numbers_before_it_loads(arguments, capsys, monkeypatch):
    from hf_paged.cli import demo, main

    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("loaded before it looked"))
    assert main.main(["demo", *arguments]) == 1
    assert "must be" in capsys.readouterr().err


def test_stats_add_up():
    paged = zoo.build("gemma3_text", "paged")
    assert hf_paged.stats(paged).total_blocks == 0
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget="1MiB"))
    cache = DynamicCache(config=paged.config)
    with torch.no_grad():
        paged(**zoo.prompts([10, 3]), past_key_values=cache)
    stats = hf_paged.stats(paged)
    assert stats.free_blocks + stats.cached_blocks + stats.used_blocks == stats.total_blocks
    # Full layer: 10 + 3 tokens in 3 + 1 blocks. Window of 7: tokens 4 .. 9 and 0 .. 2, in 2 + 1.
    assert (stats.used_blocks, stats.tokens_stored, stats.block_size) == (7, 22, 4)
    assert stats.waste == pytest.approx(1 - 22 / 28)
    # 1 MiB of a model with 2 layers, 2 KV heads of 16, keys and values, float32, blocks of 4, in each group.
    assert stats.total_blocks == 2 * (2**20 // (2 * 2 * 16 * 2 * 4 * 4))
    del cache


def test_shared_slots_count_once():
    paged = zoo.build("llama", "paged")
    hf_paged.configure(paged, PagedConfig(block_size=4))
    cache = DynamicCache(config=paged.config)
    with torch.no_grad():
        paged(zoo.prompts([10])["input_ids"], past_key_values=cache)
    cache.batch_repeat_interleave(5)
    assert hf_paged.stats(paged).tokens_stored == 10
    del cache


def test_release_starts_anew_and_spares_live_caches():
    dense, paged = zoo.pair("llama")
    ids = zoo.prompts([9])["input_ids"]
    caches = [DynamicCache(config=model.config) for model in (dense, paged)]
    with torch.no_grad():
        for model, cache in zip((dense, paged), caches):
            model(ids, past_key_values=cache)
        hf_paged.release(paged)
        assert hf_paged.stats(paged).total_blocks == 0
        logits = [model(ids[:, :1], past_key_values=cache).logits for model, cache in zip((dense, paged), caches)]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    del caches, cache


def test_a_call_larger_than_the_budget_runs_with_a_warning(monkeypatch):
    from hf_paged.memory import kv_pool

    warnings = []
    monkeypatch.setattr(kv_pool.logger, "warning_once", warnings.append)
    dense, paged = zoo.pair("llama")[0], zoo.build("llama", "paged")
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget=8 * 1024))
    inputs, options = zoo.prompts([30, 20, 10]), {"max_new_tokens": 12, "num_beams": 2}
    assert torch.equal(dense.generate(**inputs, **options), paged.generate(**inputs, **options))
    assert warnings and "memory_budget holds 4" in warnings[0] and "Lower the batch" in warnings[0]


def test_what_memory_cannot_hold_is_refused_whole(monkeypatch):
    from hf_paged.memory import kv_pool

    monkeypatch.setattr(kv_pool, "physical_memory", lambda device: 16 * 1024)
    paged = zoo.build("llama", "paged")
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget=8 * 1024))
    with pytest.raises(hf_paged.OutOfBlocksError, match=r"needs 16 blocks, 4 of 4 are free: lower the batch"):
        paged.generate(**zoo.prompts([30, 20, 10]), max_new_tokens=12, num_beams=2)
    assert hf_paged.stats(paged).used_blocks == 0
    paged.generate(**zoo.prompts([10]), max_new_tokens=2)


def native_storage(num_kv_heads, key_dim, value_dim, device, capacity):
    shape = BlockShape(num_kv_heads, 16, key_dim, value_dim)
    return KVStorage(NativeFormat(torch.float32), shape, device, capacity)


def test_untouched_memory_costs_nothing():
    import psutil

    before = psutil.Process().memory_info().rss
    storage = native_storage(8, 128, 128, torch.device("cpu"), capacity=32768)
    assert storage.pages[0].nbytes == 2 * 2**30
    storage.pages[0][7] = 1.0
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


class Boom(Exception):
    pass


def boom_at(count):
    calls = []

    def boom(*_, **__):
        calls.append(1)
        if len(calls) == count:
            raise Boom

    return boom


@pytest.mark.parametrize("place", ["streamer", "processor", "criterion"])
@pytest.mark.parametrize("count", [1, 4])
def test_an_exception_in_a_callback_leaves_the_pool_whole(place, count):
    dense, paged = zoo.pair("llama")
    boom = boom_at(count)

    class Streamer:
        put, end = staticmethod(boom), staticmethod(lambda: None)

    def processor(ids, scores):
        boom()
        return scores

    def criterion(ids, scores, **_):
        boom()
        return torch.zeros(len(ids), dtype=torch.bool)

    kwargs = {
        "streamer": {"streamer": Streamer()},
        "processor": {"logits_processor": LogitsProcessorList([processor])},
        "criterion": {"stopping_criteria": StoppingCriteriaList([criterion])},
    }[place]
    inputs = zoo.prompts([9] if place == "streamer" else [9, 5])
    with pytest.raises(Boom):
        paged.generate(**inputs, max_new_tokens=12, **kwargs)
    assert hf_paged.stats(paged).used_blocks == 0
    assert torch.equal(dense.generate(**inputs, max_new_tokens=6), paged.generate(**inputs, max_new_tokens=6))


def test_blocks_return_when_the_cache_is_dropped():
    paged = zoo.pair("llama")[1]
    output = paged.generate(**zoo.prompts([9]), max_new_tokens=4, return_dict_in_generate=True)
    assert hf_paged.stats(paged).used_blocks > 0
    del output
    assert hf_paged.stats(paged).used_blocks == 0


def test_threads_share_one_pool():
    dense, paged = zoo.pair("gemma3_text")
    hf_paged.release(paged)
    inputs = [zoo.prompts([3 + index, 9], seed=index) for index in range(8)]
    expected = [dense.generate(**each, max_new_tokens=20) for each in inputs]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda each: paged.generate(**each, max_new_tokens=20), inputs))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    stats = hf_paged.stats(paged)
    assert stats.page_reads > 0 and not stats.gathers
