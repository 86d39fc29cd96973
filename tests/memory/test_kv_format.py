"""KV formats: one that brings `parts`, `encode` and `decode` alone is right everywhere that keys and values go.

Models compute in float64, so that two ways to the same states never round them to different numbers.
"""

import pytest
import torch
import torch._dynamo
from transformers import DynamicCache, EncoderDecoderCache

import hf_paged
from hf_paged import PagedConfig
from hf_paged.memory.kv_format import (
    KV_FORMATS,
    BlockShape,
    Float8Format,
    Int8Format,
    KVFormat,
    NativeFormat,
    Part,
)
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import registry
from support import zoo
from support.packing import SAMPLE
from support.prefixes import found, prompts
from support.rounding import rounded_cache


class HalfPages(KVFormat):
    """States as bfloat16."""

    name = "half"

    def parts(self, head_dim):
        return (Part(torch.bfloat16, head_dim),)

    def encode(self, states, is_key):
        return (states.to(torch.bfloat16),)

    def decode(self, parts, is_key):
        return parts[0].to(self.states_dtype)


class ScaledPages(KVFormat):
    """Whole numbers from -31 to 31 for keys and to 15 for values, and a scale for each token and head."""

    name = "scaled"

    def parts(self, head_dim):
        return Part(torch.int8, head_dim), Part(torch.float32, 1)

    def encode(self, states, is_key):
        scale = states.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / (31 if is_key else 15)
        return (states / scale).round().to(torch.int8), scale

    def decode(self, parts, is_key):
        return parts[0].to(self.states_dtype) * parts[1]


FORMATS = {"half": HalfPages, "scaled": ScaledPages, **KV_FORMATS}
LENGTHS = {"max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}


def pair(kv_dtype, name="llama", dtype=torch.float64, **config):
    dense, paged = zoo.pair(name, dtype)
    config = {"kv_dtype": kv_dtype, "kv_dtype_window": kv_dtype, **config}
    hf_paged.configure(paged, PagedConfig(block_size=4, token_budget=16, **config))
    return dense, paged


def dtypes_of(model):
    config = registry.config_of(model)
    return config.kv_dtype, config.kv_dtype_window


def compare(models, inputs, is_packed=True, **options):
    """Compare paged output with that of a dense cache that rounds; tell whether rounding changes the output at all."""
    dense, paged = models
    options = {**LENGTHS, **options}
    outputs = []
    for model, cache in (
        (dense, rounded_cache(dense, *dtypes_of(paged))),
        (dense, DynamicCache(config=dense.config)),
        (paged, None),
    ):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **options, **({} if cache is None else {"past_key_values": cache})))
    rounded, exact, got = (getattr(output, "sequences", output) for output in outputs)
    assert torch.equal(got, rounded)
    if "output_scores" in options:
        rounded, exact, got = (output.sequences_scores for output in outputs)
        torch.testing.assert_close(got, rounded, rtol=1e-6, atol=0)
    elif "output_logits" in options:
        rounded, exact, got = (torch.stack(output.logits) for output in outputs)
        torch.testing.assert_close(got, rounded, rtol=1e-6, atol=1e-6)
    stats = hf_paged.stats(paged)
    assert stats.page_reads and not stats.gathers and bool(stats.packed_calls) == is_packed
    return bool((rounded != exact).any())


@pytest.fixture(params=FORMATS)
def format_name(request, monkeypatch):
    monkeypatch.setitem(KV_FORMATS, request.param, FORMATS[request.param])
    yield request.param
    for name in ("llama", "gemma3_text", "minicpm3"):
        hf_paged.configure(zoo.pair(name, torch.float64)[1], PagedConfig())  # The format may be gone.


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "minicpm3"])
def test_packed_rows_read_what_the_format_keeps(name, format_name):
    models = pair(format_name, name)
    for seed in range(3):
        compare(models, prompts([30, 9, 26, 1], shared=8, seed=seed))
    logits = {"return_dict_in_generate": True, "output_logits": True}
    assert compare(models, prompts([30], seed=5), **logits), "the format changes nothing: was it used?"
    (pool,) = registry.pools_under(models[1])
    pages = [page.dtype for group in pool.groups.values() for layer in group.layers.values() for page in layer.pages]
    assert set(pages) == {part.dtype for part in FORMATS[format_name](torch.float64).parts(16)}


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_beams_write_copy_and_read_it(name, format_name):
    models = pair(format_name, name)
    beams = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    assert compare(models, zoo.prompts([13, 6]), is_packed=False, **beams), "the format changes nothing: was it used?"


def test_cross_attention_reads_it_in_place(format_name):
    dense, paged = (zoo.build_encoder_decoder("bart", attention).double() for attention in ("sdpa", "paged"))
    hf_paged.configure(paged, PagedConfig(block_size=4, kv_dtype=format_name))
    inputs, options = zoo.prompts([11, 11]), {**LENGTHS, "return_dict_in_generate": True, "output_logits": True}
    caches = [rounded_cache(dense, format_name), rounded_cache(dense, format_name)]
    outputs = [
        model.generate(**inputs, **options, past_key_values=cache)
        for model, cache in (
            (dense, EncoderDecoderCache(*caches)),
            (dense, EncoderDecoderCache(DynamicCache(config=dense.config), DynamicCache(config=dense.config))),
            (paged, None),
        )
    ]
    rounded, exact, got = (torch.stack(output.logits) for output in outputs)
    torch.testing.assert_close(got, rounded, rtol=1e-6, atol=1e-6)
    assert (exact[:2] - rounded[:2]).abs().max() > 1e-4, "the format changes nothing: was it used?"
    assert hf_paged.stats(paged).page_reads and not hf_paged.stats(paged).gathers


def test_rows_that_diverge_copy_blocks_with_all_their_parts(format_name, monkeypatch):
    copied, copy_blocks = [], KVStorage.copy_blocks
    monkeypatch.setattr(
        KVStorage, "copy_blocks", lambda self, *blocks: (copied.append(self), copy_blocks(self, *blocks))[1]
    )
    compare(pair(format_name), zoo.prompts([13, 6]), num_return_sequences=3, **SAMPLE)
    assert copied


def test_the_prefix_cache_serves_it(format_name):
    models = pair(format_name)
    for seed in range(3):
        compare(models, prompts([30, 26], seed=seed))
    assert found(models[1]) >= 5 * 24


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_prefix_is_saved_with_all_its_parts_and_for_no_other_format(name, format_name, tmp_path):
    models, path = pair(format_name, name), tmp_path / "prefix"
    inputs = prompts([30], shared=24)
    assert hf_paged.save_prefix(models[1], path, inputs["input_ids"][:, :24]) == 24
    hf_paged.release(models[1])
    assert hf_paged.load_prefix(models[1], path) == 24
    compare(models, inputs)
    assert found(models[1]) == 24
    pair(None, name)
    with pytest.raises(hf_paged.SavedPrefixError, match=f"{format_name}.*native"):
        hf_paged.load_prefix(models[1], path)


def test_a_small_pool_evicts_and_preempts(format_name):
    shape = BlockShape(num_kv_heads=2, block_size=4, key_dim=16, value_dim=16)
    block_bytes = FORMATS[format_name](torch.float64).block_bytes(shape)
    models = pair(format_name, memory_budget=22 * 2 * block_bytes)
    compare(models, zoo.prompts([13, 14, 30, 19, 21, 11]))
    stats = hf_paged.stats(models[1])
    assert stats.total_blocks == 22, "the budget counts bytes as the format stores them"
    assert stats.prefix_lookups > 6, "no row was preempted"


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_cache_is_read_back_in_the_dtype_of_states(name, format_name):
    dense, paged = pair(format_name, name)
    inputs = zoo.prompts([11])
    caches = []
    for model, cache in (
        (dense, rounded_cache(dense, format_name, format_name)),
        (paged, DynamicCache(config=paged.config)),
    ):
        caches.append(model.generate(**inputs, **LENGTHS, past_key_values=cache, return_dict_in_generate=True))
    assert hf_paged.stats(paged).packed_calls == 1
    for expected, got in zip(*(output.past_key_values.layers for output in caches)):
        for wanted, states in ((expected.keys, got.keys), (expected.values, got.values)):
            assert states.dtype == torch.float64
            torch.testing.assert_close(states, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format_name", ["scaled", "int8"], indirect=True)
def test_a_compiled_step_has_no_graph_break(format_name):
    models = pair(format_name)
    hf_paged.release(models[1])  # The engine is made anew, after the model was compiled.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = models[1].forward
    models[1].forward = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    try:
        compare(models, zoo.prompts([13, 4]), max_new_tokens=4, min_new_tokens=4)
    finally:
        models[1].forward = forward
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    torch._dynamo.reset()


def test_kernels_attend_to_decoded_pages_within_float32(format_name):
    """In float32 the C++ kernels read what the format decodes; states on an edge may round to either side."""
    dense, paged = pair(format_name, dtype=torch.float32)
    options = {**LENGTHS, "max_new_tokens": 1, "min_new_tokens": 1, "return_dict_in_generate": True}
    inputs = zoo.prompts([40])
    rounded, exact, got = (
        model.generate(**inputs, **options, output_logits=True, past_key_values=cache).logits[0]
        for model, cache in (
            (dense, rounded_cache(dense, format_name)),
            (dense, DynamicCache(config=dense.config)),
            (paged, DynamicCache(config=paged.config)),
        )
    )
    assert hf_paged.stats(paged).packed_calls == 1
    assert (got - rounded).abs().max() < 0.1 * (exact - rounded).abs().max()
    hf_paged.configure(paged, PagedConfig())


def storage(format_class, dtype=torch.float32):
    return KVStorage(format_class(dtype), BlockShape(2, 4, 8, 6), torch.device("cpu"), num_blocks=5)


@pytest.mark.parametrize("format_class", [NativeFormat, *FORMATS.values()])
def test_what_is_written_is_gathered_and_copied(format_class):
    torch.manual_seed(0)
    pages, slots = storage(format_class), torch.tensor([7, 4, 18, 13])
    for page in pages.pages:
        page.zero_()
    states = torch.randn(4, 2, 8), torch.randn(4, 2, 6)
    pages.write(*states, slots)
    pages.copy_blocks(torch.tensor([1, 3]), torch.tensor([2, 0]))
    for is_key, written in zip((True, False), states):
        wanted = torch.zeros(5, 2, 4, written.shape[2])
        kept = pages.kv_format.as_stored(written, is_key)
        for slot, state in zip(slots.tolist(), kept):
            wanted[slot // 4, :, slot % 4] = state
        wanted[2], wanted[0] = wanted[1], wanted[3]
        blocks = torch.tensor([4, 0, 2, 2, 1, 3])
        torch.testing.assert_close(pages.gather(is_key, blocks), wanted[blocks], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_class", [NativeFormat, *FORMATS.values()])
def test_blocks_come_back_bit_for_bit_in_other_places(format_class):
    """Whatever lies there, in every part: NaN in unused slots, too."""
    torch.manual_seed(0)
    pages, other = storage(format_class), storage(format_class)
    for page in (*pages.pages, *other.pages):
        page.view(torch.uint8).random_()
    blocks, places = torch.tensor([3, 0, 4]), torch.tensor([1, 4, 0])
    rest = [page[[2, 3]].view(torch.uint8).clone() for page in other.pages]
    parts = pages.read_blocks(blocks)
    assert [part.shape for part in parts] == [(3, *page.shape[1:]) for page in pages.pages]
    other.write_blocks(places, parts)
    for page, written, kept in zip(pages.pages, other.pages, rest, strict=True):
        assert torch.equal(page[blocks].view(torch.uint8), written[places].view(torch.uint8))
        assert torch.equal(written[[2, 3]].view(torch.uint8), kept)
    for wrong in (parts[1:], [part[:1] for part in parts], [part.double() for part in parts]):
        with pytest.raises(AssertionError, match="another"):
            other.write_blocks(places, tuple(wrong))


@pytest.mark.parametrize("format_class", [NativeFormat, *FORMATS.values()])
def test_padding_is_not_stored(format_class):
    """Steps of one shape are padded with tokens of slot -1, some or all of them."""
    torch.manual_seed(0)
    padded, plain = storage(format_class), storage(format_class)
    states = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    for pages in (padded, plain):
        for page in pages.pages:
            page.zero_()
        pages.write(*states, torch.tensor([7, 4, 18]))
    new = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    padded.write(*new, torch.tensor([-1, 5, -1]))
    plain.write(*(state[1:2] for state in new), torch.tensor([5]))
    padded.write(*new, torch.tensor([-1, -1, -1]))
    assert all(torch.equal(a, b) for a, b in zip(padded.pages, plain.pages, strict=True))


@pytest.mark.parametrize(
    "format_class, token_bytes",
    [
        (NativeFormat, 4 * 14),
        (HalfPages, 2 * 14),
        (ScaledPages, 14 + 2 * 4),
        (Int8Format, 14 + 2 * 4),
        (Float8Format, 14 + 2 * 4),
    ],
)
def test_bytes_of_a_block_are_those_of_its_pages(format_class, token_bytes):
    pages = storage(format_class)
    assert pages.block_bytes == 2 * 4 * token_bytes
    assert sum(page.nbytes for page in pages.pages) == 5 * pages.block_bytes


def test_states_that_a_format_does_not_store_are_refused():
    with pytest.raises(hf_paged.UnsupportedError, match="'half' does not store states in torch.int64: load"):
        HalfPages(torch.int64)
    pages = storage(HalfPages)
    key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 6)
    assert pages.accepts(key, value) and pages.states_dtype is torch.float32
    assert not pages.accepts(key.to(torch.bfloat16), value.to(torch.bfloat16))
    assert not pages.accepts(value, key)
