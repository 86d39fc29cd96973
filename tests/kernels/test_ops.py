"""One matrix for every implementation of the op layer, against the float64 oracle; unused slots hold NaN."""

import functools

import pytest
import torch

from hf_paged_kernels import reference, torch_sdpa
from hf_paged_kernels.quantized import dequantize, quantize, rotate
from support.op_matrix import (
    BATCHES,
    CODES,
    HEADS,
    IMPLEMENTATIONS,
    ISAS,
    OPTIONS,
    SLOTS,
    assert_accurate,
    check_padded_step,
    check_quantized_write,
    check_write_kv,
    exact,
    hide_before_window,
    implementation,
    make_pages,
    quantized_pages,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    with implementation(request.param) as module:
        yield module


@functools.cache
def case(batch, heads, block_size, dtype, dims, scale, options):
    """Arguments, options and the exact answer, once for all implementations."""
    arguments, sinks = make_pages(batch, heads, block_size, dtype, *dims)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = sinks
    if "window" in options:
        hide_before_window(arguments, options["window"])
    return arguments, options, exact(arguments, scale, **options)


def check(kernels, batch, heads, block_size=16, dtype=torch.float32, dims=(16, 16), scale=0.3, options=None):
    key = tuple(batch), heads, block_size, dtype, dims, scale, tuple((options or {}).items())
    arguments, options, expected = case(*key)
    got = kernels.paged_attention(*arguments, scale, **options)
    assert got.dtype == dtype
    assert_accurate(got, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_paged_attention(kernels, batch, options):
    for heads in HEADS:
        check(kernels, BATCHES[batch], heads, options=options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims", [(16, 16), (64, 64), (24, 8), (20, 40), (80, 80), (96, 5), (1, 1), (256, 256)], ids=str
)
def test_dtypes_and_head_sizes(kernels, dtype, dims):
    for batch in ("decode", "mixed"):
        for options in ({}, OPTIONS[-1]):
            check(kernels, BATCHES[batch], (6, 2), 16, dtype, dims, dims[0] ** -0.5, options)


@pytest.mark.parametrize("block_size", [4, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_block_sizes(kernels, block_size, dtype):
    """Contexts that end just before, at and just after the end of a block."""
    edges = [(context, 1) for context in (1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3)]
    for batch in (edges, [(2 * block_size + 1, block_size + 2), (block_size, 2)]):
        check(kernels, batch, (6, 2), block_size, dtype, (32, 32))


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (8, 1), (17, 1), (71, 1), (200, 1), (32, 8)], ids=str)
def test_groups_of_any_size(kernels, heads):
    for dtype in DTYPES[:2]:
        check(kernels, [(40, 1), (21, 3)], heads, 16, dtype, (32, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_split(kernels, dtype):
    """Contexts of several chunks, which different threads may take, with and without a window."""
    batch = [(1700, 1), (3, 1), (1024, 1), (1025, 1)]
    for options in ({}, {"sinks": True}, {"window": 1100}):
        check(kernels, batch, (6, 2), 16, dtype, (64, 64), 0.125, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_prefill(kernels, dtype):
    """More queries than a tile holds, over several tiles of keys."""
    for options in ({}, {"window": 100}):
        check(kernels, [(300, 200), (130, 130)], (4, 2), 16, dtype, (64, 64), 0.125, options)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_slot_can_be_the_peak(kernels, dtype, queries):
    """Attention peaked at one token: a dropped or repeated slot changes the answer wholly."""
    context, block_size = 83, 16
    arguments, _ = make_pages([(context, queries)], (2, 1), block_size, dtype, 32, 32)
    query, keys, values, tables, *_ = arguments
    query[:] = query[0, 0]
    for peak in range(context - queries + 1):
        block, offset = int(tables[0, peak // block_size]), peak % block_size
        before = keys[block, 0, offset].clone()
        keys[block, 0, offset] = 4 * query[0, 0]
        got = kernels.paged_attention(*arguments, 1.0)
        keys[block, 0, offset] = before
        torch.testing.assert_close(got, values[block, 0, offset].expand_as(got))


def test_scores_beyond_the_range_of_exp(kernels):
    """Far apart scores: what is far below the maximum weighs nothing, and nothing overflows."""
    arguments, _ = make_pages([(70, 1), (70, 4)], (2, 1), 16, torch.float32, 16, 16)
    arguments[0][:] *= 100
    assert_accurate(kernels.paged_attention(*arguments, 1.0), exact(arguments, 1.0))


def test_query_strides_do_not_matter(kernels):
    for batch in (BATCHES["decode"], BATCHES["mixed"]):
        (query, *rest), _ = make_pages(batch, (4, 2), 16, torch.float32)
        strided = query.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert_accurate(kernels.paged_attention(strided, *rest, 0.3), exact((query, *rest), 0.3))


def test_rows_of_block_tables_may_lie_apart(kernels):
    """Those of a step lie in a wider matrix. Kernels that would leave the call to torch cost a decode step its time."""
    for batch in (BATCHES["decode"], BATCHES["mixed"]):
        (query, keys, values, tables, *rows), _ = make_pages(batch, (4, 2), 16, torch.float32)
        wide = torch.full((len(tables), tables.shape[1] + 3), -1)
        wide[:, : tables.shape[1]] = tables
        strided = wide[:, : tables.shape[1]]
        expected = kernels.paged_attention(query, keys, values, tables, *rows, 0.3)
        assert torch.equal(kernels.paged_attention(query, keys, values, strided, *rows, 0.3), expected)


def test_the_oracle_is_plain_attention():
    """The reference itself against torch's SDPA on the tokens in order."""
    (query, keys, values, tables, contexts, starts), _ = make_pages([(11, 11)], (4, 2), 4, torch.float64)
    flat = [cache[tables[0]].transpose(1, 2).flatten(0, 1)[:11].transpose(0, 1) for cache in (keys, values)]
    states = [states.repeat_interleave(2, dim=0)[None] for states in flat]
    expected = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1)[None], *states, is_causal=True)
    got = reference.paged_attention(query, keys, values, tables, contexts, starts, 16**-0.5)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_write_kv(kernels, dtype, slots):
    check_write_kv(kernels, SLOTS[slots], dtype)


@pytest.mark.parametrize("slots", SLOTS)
def test_the_oracle_stores_tokens_and_no_padding(slots):
    states, pages = torch.arange(1.0, 6).view(5, 1, 1)[: len(SLOTS[slots])], torch.zeros(2, 5, 1, 4, 1)
    reference.write_kv(states, -states, *pages, torch.tensor(SLOTS[slots], dtype=torch.long))
    held = {slot: float(number) for slot, number in enumerate(pages[0].flatten()) if number}
    assert held == {slot: number + 1.0 for number, slot in enumerate(SLOTS[slots]) if slot >= 0}
    assert torch.equal(pages[1], -pages[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_of_a_step(kernels, dtype):
    check_padded_step(kernels, dtype)


def test_write_kv_takes_any_strides(kernels):
    shapes = [torch.randn(3, 9, 16).transpose(0, 1), torch.randn(16, 3, 9).permute(2, 1, 0)]
    for states in shapes:
        caches = [torch.zeros(5, 3, 4, 16) for _ in range(4)]
        kernels.write_kv(states, states, *caches[:2], torch.arange(9))
        reference.write_kv(states, states, *caches[2:], torch.arange(9))
        assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_many_tokens_are_written(kernels):
    """Enough bytes for several threads."""
    states = torch.randn(2, 1024, 3, 64)
    caches = [torch.zeros(80, 3, 16, 64) for _ in range(4)]
    slots = torch.randperm(80 * 16)[:1024]
    kernels.write_kv(*states, *caches[:2], slots)
    reference.write_kv(*states, *caches[2:], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("copies", [[(1, 4), (1, 5), (0, 3)], []], ids=str)
def test_copy_blocks(kernels, dtype, copies):
    caches = [torch.randn(6, 2, 4, dim).to(dtype) for dim in (8, 4)]
    before = [cache.clone() for cache in caches]
    source, destination = torch.tensor(copies, dtype=torch.long).view(-1, 2).unbind(1)
    kernels.copy_blocks(*caches, source, destination)
    for cache, old in zip(caches, before):
        assert torch.equal(cache[destination], old[source]) and torch.equal(cache[:3], old[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_and_attend(kernels, dtype):
    """The new tokens are written first: every query sees its own."""
    arguments, _ = make_pages([(20, 1), (18, 3)], (4, 2), 16, dtype, 32, 24)
    query, keys, values, tables, contexts, starts = arguments
    new = [torch.randn(4, 2, dim).to(dtype) for dim in (32, 24)]
    slots = torch.tensor([int(tables[0, 1]) * 16 + 3, *(int(tables[1, t // 16]) * 16 + t % 16 for t in (15, 16, 17))])
    for cache in (keys, values):
        for slot in slots.tolist():
            cache[slot // 16, :, slot % 16] = float("nan")
    expected_caches = [cache.clone() for cache in (keys, values)]
    reference.write_kv(*new, *expected_caches, slots)
    expected = exact((query, *expected_caches, tables, contexts, starts), 0.3)
    got = kernels.write_and_attend(query, *new, keys, values, slots, tables, contexts, starts, 0.3)
    assert_accurate(got, expected)
    torch.testing.assert_close([keys, values], expected_caches, atol=0, rtol=0, equal_nan=True)


def check_quantized(kernels, batch, heads, codes, dtype, block_size=16, dims=(16, 16), scale=0.3, options=None):
    arguments, sinks = make_pages(batch, heads, block_size, dtype, *dims)
    options = {**(options or {}), **({"sinks": sinks} if "sinks" in (options or {}) else {})}
    if "window" in options:
        hide_before_window(arguments, options["window"])
    query, keys, values, *rows = arguments
    pages, scales = quantized_pages((keys, values), codes)
    expected = exact((query, *pages, *rows), scale, **options, **scales)
    got = kernels.paged_attention(query, *pages, *rows, scale, **options, **scales)
    assert got.dtype == dtype
    assert_accurate(got, expected)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_quantized_pages(kernels, batch, dtype, codes):
    for options in OPTIONS:
        check_quantized(kernels, BATCHES[batch], (9, 3), codes, dtype, options=options)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(
    "dims", [(64, 64), (24, 8), (20, 40), (80, 80), (96, 5), (1, 1), (128, 128), (256, 256)], ids=str
)
def test_head_sizes_of_quantized_pages(kernels, dims, codes):
    for batch in ("decode", "mixed"):
        for dtype in DTYPES:
            check_quantized(kernels, BATCHES[batch], (6, 2), codes, dtype, dims=dims, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_long_rows_of_quantized_pages(kernels, codes):
    """Contexts that are split, tiles of many queries, groups of any size, blocks of any size."""
    for dtype in DTYPES[:2]:
        for batch in ([(1700, 1), (3, 1), (1025, 1)], [(300, 200), (130, 130)]):
            check_quantized(kernels, batch, (6, 2), codes, dtype, 64, (64, 64))
        for heads in ((7, 1), (17, 1), (32, 8)):
            check_quantized(kernels, [(40, 1), (21, 3)], heads, codes, dtype, 4, (32, 32))


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_windows_and_groups_of_quantized_pages(kernels, codes):
    """Windows that begin inside a chunk, groups that fill no vector, heads that fill no line."""
    for dtype in DTYPES[:2]:
        check_quantized(kernels, [(1700, 1), (1024, 1)], (6, 2), codes, dtype, 16, (64, 64), 0.125, {"window": 1100})
        for num_heads in (1, 2, 3, 5, 6, 8):
            check_quantized(kernels, [(70, 1), (67, 3)], (num_heads, 1), codes, dtype, dims=(64, 64), scale=0.125)
        for dims in ((48, 33), (33, 65), (129, 130), (192, 128)):
            check_quantized(kernels, [(70, 1), (67, 3)], (3, 1), codes, dtype, dims=dims, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("queries", [1, 2])
def test_every_code_is_read(kernels, codes, queries):
    """A token seen alone gives its value: subnormal codes of float8 and the ends of int8 included."""
    every = torch.arange(256, dtype=torch.uint8).view(codes)
    every = torch.where(every.float().isnan(), torch.zeros(256, dtype=torch.uint8), every.view(torch.uint8)).view(codes)
    pages = [torch.zeros(1, 1, 4, 256, dtype=torch.uint8).view(codes) for _ in range(2)]
    pages[1][0, 0, 0] = every
    scales = [torch.full((1, 1, 4, 1), 0.37) for _ in range(2)]
    rows = torch.zeros(1, 1, dtype=torch.long), torch.tensor([queries]), torch.tensor([0, queries])
    query = torch.randn(queries, 1, 256)
    got = kernels.paged_attention(query, *pages, *rows, 0.1, None, None, None, *scales)
    torch.testing.assert_close(got[0, 0], every.float() * 0.37, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_zeros_and_outliers_in_quantized_pages(kernels, codes):
    """Vectors of zeros have a scale of zero; one value may be a thousand times the others."""
    for dtype in DTYPES:
        for queries in (1, 3):
            (query, keys, values, *rows), _ = make_pages([(90, queries), (40, queries)], (6, 2), 16, dtype, 64, 64)
            tables = rows[0]
            query[0, :2] = 0
            keys[tables[0, 1]] = 0
            values[tables[0, 2], :, 3] *= 1000
            values[tables[1, :3]] = 0
            pages, scales = quantized_pages((keys, values), codes)
            got = kernels.paged_attention(query, *pages, *rows, 0.125, **scales)
            assert not got[queries:].any()
            assert_accurate(got, exact((query, *pages, *rows), 0.125, **scales))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_quantized_value_that_is_not_finite_is_seen(kernels, codes, queries):
    """As dense attention with it would be NaN: in its head, in its row."""
    for dtype in DTYPES[:2]:
        (query, keys, values, *rows), _ = make_pages([(40, queries), (40, queries)], (4, 2), 16, dtype, 64, 64)
        values[rows[0][1, 1], 1, 5, 7] = float("inf")
        pages, scales = quantized_pages((keys, values), codes)
        got = kernels.paged_attention(query, *pages, *rows, 0.125, **scales)
        assert got[queries:, 2:].isnan().all() and got[:queries].isfinite().all() and got[queries:, :2].isfinite().all()


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_values_are_rounded_as_torch_rounds_them(kernels, codes):
    """Bit for bit, of any size and from any strides, on several threads: no code is one off without a reason."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(3, 64, 1500, generator=generator) ** 5).permute(2, 0, 1)
    pages = [torch.zeros(94, 3, 16, 64, dtype=codes) for _ in range(2)] + [torch.zeros(94, 3, 16, 1) for _ in range(2)]
    slots = torch.randperm(94 * 16, generator=generator)[:1500]
    kernels.write_kv(values, values, *pages[:2], slots, *pages[2:])
    expected = quantize(values, codes)
    for page, wanted in zip(pages[1::2], expected):
        got = page.transpose(1, 2).flatten(0, 1)[slots]
        assert torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_quantized_calls_run_in_the_kernels(isa, codes):
    """A call that went to torch would gather and dequantise its context: right, and many times slower."""
    for dtype in DTYPES:
        (query, keys, values, *rows), _ = make_pages([(20, 1), (9, 3)], (4, 2), 16, dtype, 32, 24)
        pages, scales = quantized_pages((keys, values), codes)
        new = [torch.randn(4, 2, dim, dtype=dtype) for dim in (32, 24)]
        with implementation(isa) as kernels, torch.profiler.profile() as profile:
            kernels.write_and_attend(
                query, *new, *pages, torch.arange(4), *rows, 0.3, None, None, None, *scales.values()
            )
        names = {event.name for event in profile.events()}
        assert "hf_paged::write_and_attend" in names and not any(name.endswith("_torch") for name in names)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("slots", SLOTS)
def test_quantized_write(kernels, slots, codes):
    for dtype in DTYPES:
        for dims in ((16, 8), (64, 64), (80, 24), (5, 1)):
            check_quantized_write(kernels, SLOTS[slots], dtype, codes, dims)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_quantized_write_and_attend(kernels, codes):
    """The new tokens are written first, from any strides: every query sees its own."""
    arguments, _ = make_pages([(20, 1), (18, 3)], (4, 2), 16, torch.float32, 32, 24)
    query, keys, values, tables, contexts, starts = arguments
    new = [torch.randn(2, dim, 4).permute(2, 0, 1) for dim in (32, 24)]
    slots = torch.tensor([int(tables[0, 1]) * 16 + 3, *(int(tables[1, t // 16]) * 16 + t % 16 for t in (15, 16, 17))])
    pages, scales = quantized_pages((keys, values), codes)
    rows = slots, tables, contexts, starts
    got = kernels.write_and_attend(query, *new, *pages, *rows, 0.3, None, None, None, *scales.values())
    assert_accurate(got, exact((query, *pages, tables, contexts, starts), 0.3, **scales))
    written = dequantize(pages[0], scales["key_scales"]).transpose(1, 2).flatten(0, 1)[slots]
    bound = new[0].abs().amax() * (0.01 if codes == torch.int8 else 0.07)
    assert (rotate(written) - new[0]).abs().max() < bound


def test_states_that_are_not_finite_stay_so(kernels):
    """A key of infinities or NaN is NaN when it is read, as the scores of dense attention with it are."""
    pages = [torch.zeros(1, 1, 4, 16, dtype=torch.int8) for _ in range(2)] + [torch.zeros(1, 1, 4, 1) for _ in range(2)]
    states = torch.randn(3, 1, 16)
    states[1, 0, 3], states[2, 0, 0] = float("inf"), float("nan")
    kernels.write_kv(states, states, *pages[:2], torch.arange(3), *pages[2:])
    for codes, scales in (pages[::2], pages[1::2]):
        finite = dequantize(codes, scales)[0, 0].isfinite().all(-1).tolist()
        assert finite == [True, False, False, True]


@pytest.mark.parametrize("head_dim", [1, 5, 24, 64, 80, 96, 128])
def test_a_rotation_keeps_scores_and_undoes_itself(head_dim):
    query, key = torch.randn(2, 7, head_dim, dtype=torch.float64)
    torch.testing.assert_close((rotate(query) * rotate(key)).sum(-1), (query * key).sum(-1))
    torch.testing.assert_close(rotate(rotate(key)), key)


def test_a_rotation_saves_scores_from_an_outlier():
    """One channel of keys is 100 times the others: without a rotation its scale leaves them two bits."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 400, 64, generator=generator, dtype=torch.float64)
    key[:, 5] += 100
    errors = [
        ((f(query) * dequantize(*quantize(f(key), torch.int8), torch.float64)).sum(-1) - (query * key).sum(-1)).std()
        for f in (rotate, lambda states: states)
    ]
    assert errors[0] < errors[1] / 4


def test_torch_waits_for_a_device_once_where_it_reads_lengths(fake_device):
    """Each copy to the host waits for all that the device has to do: one in a call, none to store tokens or padding."""
    arguments, _ = make_pages([(20, 1), (0, 1), (40, 3)], (4, 2), 16, torch.float32)
    states, slots = torch.randn(3, 2, 16), torch.tensor([2, -1, 3])
    expected = [cache.nan_to_num() for cache in arguments[1:3]]
    reference.write_kv(states, states, *expected, slots)
    query, *caches = (tensor.nan_to_num().to(fake_device.device) for tensor in arguments[:3])
    rows = [tensor.to(fake_device.device) for tensor in arguments[3:]]
    states, slots = states.to(fake_device.device), slots.to(fake_device.device)
    with fake_device.watch() as traffic:
        torch_sdpa.write_kv(states, states, *caches, slots)
    assert traffic.waits == traffic.uploads == 0 and all(map(torch.equal, [x.cpu() for x in caches], expected))
    with fake_device.watch() as traffic:
        got = torch_sdpa.paged_attention(query, *caches, *rows, 0.3)
    assert (traffic.waits, traffic.downloads, traffic.uploads) == (1, 1, 0)
    assert_accurate(got.cpu(), exact((arguments[0], *expected, *arguments[3:]), 0.3))
