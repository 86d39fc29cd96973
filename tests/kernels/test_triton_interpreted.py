"""The Triton kernels in Triton's interpreter, against the float64 oracle over the matrix of all implementations.

Unused slots hold NaN, every address is checked, every byte counted.
"""

import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from hf_paged_evals.triton import interpreter
from hf_paged_kernels import reference
from hf_paged_kernels.triton import launch_plan
from hf_paged_kernels.triton.kernels.decode import decode_kernel
from support.interpreted_kernels import interpreted_launch
from support.op_matrix import (
    BATCHES,
    CODES,
    HEADS,
    OPTIONS,
    SLOTS,
    assert_accurate,
    check_padded_step,
    check_quantized_write,
    check_write_kv,
    exact,
    exact_latents,
    hide_before_window,
    make_latents,
    make_pages,
    quantized_pages,
)

launch = interpreted_launch()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FULL = OPTIONS[-1]
UNEVEN = {"searched": [(5, 0), (9, 2), (3, 0), (7, 1)], "one_row": [(70, 70)], "one_long_row": [(90, 3)]}


@pytest.fixture(params=["whole", "split"])
def splits(request, monkeypatch):
    """Contexts in one piece, and cut into splits of a tile or more."""
    if request.param == "split":
        monkeypatch.setattr(launch, "describe", lambda device: launch_plan.Device("sm90", 12, min_split_tokens=1))
    return request.param


def check(batch, heads, block_size=16, dtype=torch.float32, dims=(32, 32), scale=0.3, seed=0, share=1, **options):
    arguments, sinks = make_pages(batch, heads, block_size, dtype, *dims, seed)
    options = {**options, "sinks": sinks} if "sinks" in options else options
    if "window" in options:
        hide_before_window(arguments, options["window"])
    got = launch.paged_attention(*arguments, scale, **options)
    assert got.dtype == dtype
    assert_accurate(got, exact(arguments, scale, **options), share)


@pytest.mark.parametrize("batch", [*BATCHES, *UNEVEN])
def test_batches(batch, splits):
    for number, options in enumerate(OPTIONS if splits == "whole" else OPTIONS[::4]):
        check((BATCHES | UNEVEN)[batch], HEADS[number % len(HEADS)], dtype=DTYPES[number % 3], **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 8), (20, 40), (96, 5), (1, 1)], ids=str
)
def test_dims(dtype, dims):
    check([(1, 1), (50, 1), (70, 1)], (6, 2), dtype=dtype, dims=dims, scale=dims[0] ** -0.5)
    check([(1, 1), (70, 9), (0, 0), (31, 1)], (6, 2), dtype=dtype, dims=dims, scale=dims[0] ** -0.5, **FULL)


@pytest.mark.parametrize("dtype, dims", [(torch.bfloat16, (512, 512)), (torch.float16, (320, 384))], ids=str)
def test_large_heads(dtype, dims, splits):
    """Of so many numbers, some are further from the exact ones than those of small heads."""
    scale = dims[0] ** -0.5
    check([(1, 1), (50, 1), (70, 9), (0, 1)], (4, 1), dtype=dtype, dims=dims, scale=scale, share=1.5)
    check([(75, 20), (0, 0), (31, 1)], (3, 1), dtype=dtype, dims=dims, scale=scale, share=1.5, **FULL)


@pytest.mark.parametrize("block_size", [4, 16, 24, 32, 64, 128])
def test_blocks(block_size):
    """Contexts that end just before, at and just after the end of a block; blocks smaller and larger than a tile."""
    edges = [(context, 1) for context in (1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3)]
    check(edges, (6, 2), block_size)
    check(edges, (6, 2), block_size, torch.bfloat16, window=block_size)
    check([(2 * block_size + 1, block_size + 2), (block_size, 2)], (6, 2), block_size, torch.float16)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (17, 1), (40, 1), (71, 1), (32, 8)], ids=str)
def test_groups_of_any_size(heads, splits):
    for dtype in DTYPES[:2]:
        check([(40, 1), (21, 3)], heads, dtype=dtype)


def test_long_rows(splits):
    """More tiles than the pipeline has buffers, and more queries than a tile holds."""
    check([(400, 1), (3, 1), (257, 1)], (4, 2), dtype=torch.bfloat16, dims=(64, 64), scale=0.125, sinks=True)
    check([(260, 40), (50, 50)], (2, 1), dtype=torch.float16, dims=(64, 64), scale=0.125, window=100)


def test_many_splits(monkeypatch):
    """More than the reduction adds in one step, of rows that use all of them, most, and one."""
    monkeypatch.setattr(launch, "describe", lambda device: launch_plan.Device("sm90", 30, min_split_tokens=1))
    batch = [(1280, 1), (1100, 1), (64, 1)]
    arguments, _ = make_pages(batch, (1, 1), 16, torch.float32, 16, 16)
    heads = launch_plan.Heads(1, 1, 16, 16, 16, 4)
    (plan,) = launch_plan.attention_plans(launch.describe(None), heads, 3, 3, 1280)
    assert plan.extra == 57
    assert_accurate(launch.paged_attention(*arguments, 0.3), exact(arguments, 0.3))
    check(batch, (1, 1), dims=(16, 16), **FULL)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale):
    check(BATCHES["mixed"], (4, 2), scale=scale)


def test_scores_beyond_the_range_of_exp():
    arguments, _ = make_pages([(70, 1), (70, 4)], (2, 1), 16, torch.float32, 16, 16)
    arguments[0][:] *= 100
    assert_accurate(launch.paged_attention(*arguments, 1.0), exact(arguments, 1.0))


def test_strides_do_not_matter():
    for batch in (BATCHES["decode"], BATCHES["mixed"]):
        (query, *rest), _ = make_pages(batch, (4, 2), 16, torch.float32)
        for order in ((1, 2, 0), (1, 0, 2)):
            strided = query.permute(order).contiguous().permute([order.index(axis) for axis in range(3)])
            assert_accurate(launch.paged_attention(strided, *rest, 0.3), exact((query, *rest), 0.3))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_write_kv(dtype, slots):
    """Any strides; slots of no token, and everything around, stay as they are."""
    for is_transposed in (False, True):
        check_write_kv(launch, SLOTS[slots], dtype, (16, 20), is_transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_of_a_step(dtype):
    check_padded_step(launch, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [[(1, 4), (1, 5), (0, 3)], []], ids=str)
def test_copy_blocks(dtype, copies):
    caches, expected = ([torch.randn(6, 2, 32, d, generator=g).to(dtype) for d in (80, 40)] for g in generators())
    source, destination = torch.tensor(copies, dtype=torch.long).view(-1, 2).unbind(1)
    launch.copy_blocks(*caches, source, destination)
    reference.copy_blocks(*expected, source, destination)
    torch.testing.assert_close(caches, expected, atol=0, rtol=0)


def generators():
    return (torch.Generator().manual_seed(1) for _ in range(2))


def check_latents(batch, num_heads, block_size=16, dtype=torch.float32, dims=(32, 16), scale=0.3, share=1, **options):
    arguments = make_latents(batch, num_heads, block_size, dtype, *dims)
    if "window" in options:
        hide_before_window(arguments, options["window"])
    got = launch.latent_attention(*arguments, scale, **options)
    assert got.dtype == dtype
    assert_accurate(got, exact_latents(arguments, scale, **options), share)


# One row and even prompts find nothing that these do not, and take long in splits.
@pytest.mark.parametrize("batch", ["decode", "mixed", "empty_row", "padded", "no_rows", "searched", "one_long_row"])
def test_latents_of_batches(batch, splits):
    for number, options in enumerate([{}, {"window": 7}]):
        check_latents((BATCHES | UNEVEN)[batch], (4, 20)[number], dtype=DTYPES[number], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(80, 20), (5, 3)], ids=str)
def test_latents_of_any_size(dtype, dims):
    for batch in ([(1, 1), (50, 1), (70, 1)], [(1, 1), (70, 9), (0, 0), (31, 1)]):
        check_latents(batch, 6, dtype=dtype, dims=dims, scale=sum(dims) ** -0.5)


def test_latents_of_deepseek(splits):
    """Of so many numbers, some are further from the exact ones than those of small heads."""
    check_latents([(1, 1), (50, 1), (70, 9), (0, 1)], 24, dtype=torch.bfloat16, dims=(512, 64), scale=0.04, share=1.5)


@pytest.mark.parametrize("num_heads", [7, 17])
def test_latents_of_any_number_of_heads(num_heads):
    for dtype in DTYPES[:2]:
        check_latents([(40, 1), (21, 3)], num_heads, dtype=dtype)


@pytest.mark.parametrize("block_size", [4, 24, 32, 128])
def test_blocks_of_latents(block_size):
    edges = [(context, 1) for context in (1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3)]
    check_latents(edges, 6, block_size)
    check_latents(edges, 6, block_size, torch.bfloat16, window=block_size)
    check_latents([(2 * block_size + 1, block_size + 2), (block_size, 2)], 6, block_size, torch.float16)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_of_latents_that_are_not_positive(scale):
    check_latents(BATCHES["mixed"], 4, scale=scale)


def test_strides_of_latent_queries_do_not_matter():
    """Queries as products of each head with the weights leave them, and such whose last dimension is not dense."""
    queries, rest = (lambda x: (x[:2], x[2:]))(make_latents(BATCHES["mixed"], 4, 16, torch.float32))
    for order in ((1, 2, 0), (1, 0, 2)):
        strided = [x.permute(order).contiguous().permute([order.index(axis) for axis in range(3)]) for x in queries]
        assert_accurate(launch.latent_attention(*strided, *rest, 0.3), exact_latents((*queries, *rest), 0.3))


def test_write_and_attend():
    """The new tokens are written first: every query sees its own."""
    (query, keys, values, tables, contexts, starts), _ = make_pages([(20, 1), (18, 3)], (4, 2), 16, torch.bfloat16)
    new = [torch.randn(4, 2, 16).to(torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([int(tables[0, 1]) * 16 + 3, *(int(tables[1, t // 16]) * 16 + t % 16 for t in (15, 16, 17))])
    expected = [cache.clone() for cache in (keys, values)]
    reference.write_kv(*new, *expected, slots)
    got = launch.write_and_attend(query, *new, keys, values, slots, tables, contexts, starts, 0.3)
    assert_accurate(got, exact((query, *expected, tables, contexts, starts), 0.3))
    torch.testing.assert_close([keys, values], expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("before, after", [("decode", [(9, 1), (33, 1), (2, 1), (0, 1), (49, 1)]),
                                           ("mixed", [(30, 2), (50, 1), (9, 9), (20, 15), (1, 1)])])  # fmt: skip
def test_launches_replay_with_other_lengths(before, after, splits):
    """As a captured graph does: the same launches, and new numbers in the same tensors."""
    first, later = (make_pages(batch, (4, 2), 16, torch.float32)[0] for batch in (BATCHES[before], after))
    room = (
        [max(a, b) for a, b in zip(first[1].shape, later[1].shape)],
        [max(a, b) for a, b in zip(first[3].shape, later[3].shape)],
    )
    query, starts, contexts = (torch.empty_like(first[index]) for index in (0, 5, 4))
    caches, tables = [torch.empty(room[0]) for _ in range(2)], torch.zeros(room[1], dtype=torch.long)
    out = torch.empty_like(query)
    device = launch.describe(out.device)
    fixed = launch.attention_calls(device, out, query, *caches, tables, contexts, starts, 0.3)
    for new in (first, later):
        query.copy_(new[0])
        for cache, states in zip(caches, new[1:3]):
            cache[: len(states)] = states
        tables[:, : new[3].shape[1]] = new[3]
        contexts.copy_(new[4])
        starts.copy_(new[5])
        for call in fixed:
            call.launch()
        assert_accurate(out, exact(new, 0.3))


def check_quantized(batch, heads, codes, dtype=torch.bfloat16, block_size=16, dims=(32, 32), **options):
    """In bfloat16 rotated queries are rounded once more, as much as the model's own were."""
    arguments, sinks = make_pages(batch, heads, block_size, dtype, *dims)
    options = {**options, "sinks": sinks} if "sinks" in options else options
    if "window" in options:
        hide_before_window(arguments, options["window"])
    query, keys, values, *rows = arguments
    pages, scales = quantized_pages((keys, values), codes)
    scale = dims[0] ** -0.5
    got = launch.paged_attention(query, *pages, *rows, scale, **options, **scales)
    assert got.dtype == dtype
    assert_accurate(got, exact((query, *pages, *rows), scale, **options, **scales), 3 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("batch", ["decode", "mixed", "padded"])
def test_quantized_pages(batch, codes):
    """Unused slots hold NaN in scales, and in codes where there is one."""
    for dtype, options in zip(DTYPES, ({}, FULL, {"window": 7})):
        check_quantized(BATCHES[batch], (6, 2), codes, dtype, **options)


def test_splits_of_quantized_pages(monkeypatch):
    monkeypatch.setattr(launch, "describe", lambda device: launch_plan.Device("sm90", 2, min_split_tokens=1))
    check_quantized([(150, 1), (3, 1)], (2, 1), torch.float8_e4m3fn, dims=(64, 64), softcap=0.5, sinks=True)


@pytest.mark.parametrize(
    "dims, dtype",
    [((1, 1), DTYPES[1]), ((24, 8), DTYPES[2]), ((80, 96), DTYPES[1]), ((128, 64), DTYPES[0]), ((512, 16), DTYPES[1])],
    ids=str,
)
def test_head_sizes_of_quantized_pages(dims, dtype):
    """Rotations by one channel, by fewer and by more than a product mixes, and by part of a head."""
    for codes, block_size in zip(CODES, (4, 64)):
        check_quantized([(1, 1), (50, 1), (40, 20)], (4, 1), codes, dtype, block_size, dims)


def test_small_values_of_quantized_pages():
    """Weights times scales of values would be nothing in float16."""
    (query, keys, values, *rows), _ = make_pages([(70, 1)], (2, 1), 16, torch.float16, 16, 16)
    pages, scales = quantized_pages((keys, values.float() * 1e-4), torch.int8)
    got = launch.paged_attention(query, *pages, *rows, 0.3, **scales)
    expected = exact((query, *pages, *rows), 0.3, **scales)
    assert (got.double() - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_write(dtype, codes):
    """Padding is not written; heads of several sizes, a channel that outweighs the others, vectors of zeros."""
    for dims, slots in (
        ((16, 8), "padded"),
        ((80, 24), "stored"),
        ((5, 1), "padding_first"),
        ((24, 64), "none"),
        ((24, 8), "stored"),
    ):
        check_quantized_write(launch, SLOTS[slots], dtype, codes, dims)


def test_numbers_of_float8_are_rounded_as_torch_rounds():
    """All of them, what lies halfway between two, and the smallest, in values beside a number that fixes the scale."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.full((3,), 448.0)])
    numbers = torch.cat([numbers, -numbers]).view(1, 1, -1)  # [1, 1, 512]
    pages = [torch.zeros(1, 1, 4, 512).to(torch.float8_e4m3fn) for _ in "kv"] + [torch.zeros(1, 1, 4, 1) for _ in "kv"]
    launch.write_kv(numbers, numbers, *pages[:2], torch.tensor([2]), *pages[2:])
    assert pages[3][0, 0].flatten().tolist() == [0, 0, 1, 0]
    assert torch.equal(pages[1][0, 0, 2].float(), numbers[0, 0].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_states_that_are_not_finite_stay_so(codes):
    """Scales of infinite vectors are infinite, so that nothing is made of their codes."""
    states = torch.randn(3, 1, 16)
    states[1, 0, 3], states[2, 0, 0] = float("inf"), float("nan")
    pages = [torch.zeros(1, 1, 4, 16).to(codes) for _ in "kv"] + [torch.zeros(1, 1, 4, 1) for _ in "kv"]
    launch.write_kv(states, states, *pages[:2], torch.arange(3), *pages[2:])
    for held, scales in (pages[::2], pages[1::2]):
        assert (held.float() * scales)[0, 0].isfinite().all(-1).tolist() == [True, False, False, True]
        assert not held[0, 0, 1:].float().isnan().any()


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_quantized_step(codes):
    """New tokens are written first, and padding is not; the launches are those of other pages."""
    arguments, _ = make_pages(BATCHES["padded"], (4, 2), 16, torch.float32, 32, 24)
    query, keys, values, tables, contexts, starts = arguments
    new = [torch.randn(2, dim, 4).permute(2, 0, 1) for dim in (32, 24)]
    slots = torch.tensor([int(tables[0, 1]) * 16, -1, int(tables[2, 2]) * 16, -1])
    pages, scales = quantized_pages((keys, values), codes)
    expected = [x.clone() for x in (*pages, *scales.values())]
    reference.write_kv(*new, *expected[:2], slots, *expected[2:])
    rows = tables, contexts, starts
    got = launch.write_and_attend(query, *new, *pages, slots, *rows, 0.3, None, None, None, *scales.values())
    assert_accurate(got, exact((query, *pages, *rows), 0.3, **scales))
    assert not got[[1, 3]].any() and got[[0, 2]].any()
    torch.testing.assert_close([*scales.values()], expected[2:], equal_nan=True)


def kv_bytes(batch, heads, dtype=torch.bfloat16, dim=64):
    """Bytes of keys and values that are loaded, over those of reading each visible token once."""
    arguments, _ = make_pages(batch, heads, 16, dtype, dim, dim)
    with interpreter.counted_traffic() as traffic:
        launch.paged_attention(*arguments, 0.3)
    once = sum(context for context, _ in batch) * heads[1] * 2 * dim * dtype.itemsize
    return (traffic.loaded["key_cache"] + traffic.loaded["value_cache"]) / once


def test_each_key_and_value_is_read_once(splits):
    for heads in ((1, 1), (8, 2), (32, 1)):
        assert kv_bytes([(1, 1), (70, 1), (128, 1), (200, 1)], heads) == 1
    assert kv_bytes([(70, 3), (33, 1)], (8, 2)) == 1
    assert kv_bytes([(16, 16)], (8, 2)) == 1


def longest_program(batch, heads=(4, 1), **options):
    """Tiles of tokens that the program with most of them reads, and those of all programs."""
    arguments, _ = make_pages(batch, heads, 16, torch.float16, 64, 64)
    with interpreter.counted_traffic() as traffic:
        got = launch.paged_attention(*arguments, 0.3, **options)
    assert_accurate(got, exact(arguments, 0.3, **options))
    heads = launch_plan.Heads(heads[1], heads[0] // heads[1], 64, 64, 16, 2)
    tile_bytes = launch_plan.decode_plan(launch.describe(None), heads).tile * 64 * 2
    tiles = [-(-program["key_cache"] // tile_bytes) for program in traffic.by_program.values()]
    return max(tiles), sum(tiles)


RAGGED = {
    "one_long_row": [(1024, 1), *[(32, 1)] * 15],
    "two_long_rows": [(900, 1), *[(64, 1)] * 6, (0, 1), (1000, 1)],
    "even_rows": [(192, 1)] * 16,
}


@pytest.mark.parametrize("batch", RAGGED)
def test_no_program_reads_much_more_than_its_share(batch, monkeypatch):
    """Eight programs run at once; a long row among short ones must not leave seven of them idle."""
    monkeypatch.setattr(launch, "describe", lambda device: launch_plan.Device("sm90", 4, min_split_tokens=64))
    longest, total = longest_program(RAGGED[batch])
    assert longest <= max(-(-total // 8) + 1, 3)


def test_tiles_before_a_window_are_not_read(monkeypatch):
    """Nor planned for: the long row has as few splits as the tokens that its window shows."""
    monkeypatch.setattr(launch, "describe", lambda device: launch_plan.Device("sm90", 4, min_split_tokens=64))
    longest, total = longest_program([(1024, 1), (300, 1), (20, 1)], window=130)
    assert longest == 2 and total == 3 + 3 + 1


def test_each_code_and_scale_is_read_once():
    contexts = (1, 70, 128)
    arguments, _ = make_pages([(context, 1) for context in contexts], (8, 2), 16, torch.bfloat16, 64, 64)
    query, keys, values, *rows = arguments
    pages, scales = quantized_pages((keys, values), torch.int8)
    with interpreter.counted_traffic() as traffic:
        launch.paged_attention(query, *pages, *rows, 0.3, **scales)
    vectors = sum(contexts) * 2
    assert [traffic.loaded[name] for name in ("key_cache", "value_cache")] == [vectors * 64] * 2
    assert [traffic.loaded[name] for name in scales] == [vectors * 4] * 2


def test_each_value_is_written_once():
    key, value, *caches = torch.randn(9, 3, 16), torch.randn(9, 3, 8), torch.zeros(5, 3, 4, 16), torch.zeros(5, 3, 4, 8)
    with interpreter.counted_traffic() as traffic:
        launch.write_kv(key, value, *caches, torch.arange(9))
    assert traffic.stored["key_cache"] == traffic.loaded["key"] == key.nbytes
    assert traffic.stored["value_cache"] == traffic.loaded["value"] == value.nbytes


def test_the_count_of_bytes_can_fail():
    """Two tiles of queries read what both see twice; a group that is too large for a program is served by two."""
    assert kv_bytes([(32, 32)], (8, 2)) > 1.4
    assert kv_bytes([(64, 1)], (128, 1)) == 2


@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_the_check_of_addresses_can_fail(batch):
    arguments, _ = make_pages(BATCHES[batch], (4, 2), 16, torch.float32)
    arguments[3][-1, 0] = len(arguments[1])
    with pytest.raises(interpreter.interpreter.InterpreterError, match="OutOfBoundsError"):
        launch.paged_attention(*arguments, 0.3)


def test_the_check_of_unused_slots_can_fail():
    arguments, _ = make_pages(BATCHES["decode"], (4, 2), 16, torch.float32)
    arguments[4][1] += 1  # One token too many: its slot holds NaN.
    assert launch.paged_attention(*arguments, 0.3).isnan().any()


def test_the_check_of_numbers_can_fail():
    arguments, _ = make_pages(BATCHES["decode"], (4, 2), 16, torch.bfloat16)
    expected = exact(arguments, 0.3)
    arguments[1][arguments[3][2, 0], :, 3] += 1
    with pytest.raises(AssertionError):
        assert_accurate(launch.paged_attention(*arguments, 0.3), expected)


def test_bfloat16_is_rounded_as_torch_rounds():
    numbers = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, float("inf")])]
    )
    halfway = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8])
    for values in (numbers, halfway):
        rounded = torch.from_numpy(interpreter.round_to_bfloat16(values.numpy()))
        assert torch.equal(rounded, values.bfloat16().float())


def test_compiled_kernels_of_the_same_process_stay_as_they_are():
    """Triton's language is put back after a launch, and the module of a kernel holds the compiled one."""
    owners = (tl, tl.core, tl.standard, tl.math, tl.core.tensor, tl.core.dtype, triton.knobs.runtime, decode_kernel)
    before = [dict(vars(owner)) for owner in owners]
    arguments, _ = make_pages(BATCHES["mixed"], (4, 2), 16, torch.float32)
    for call in launch.attention_calls(launch.describe(arguments[0].device), arguments[0].clone(), *arguments, 0.3):
        assert isinstance(call.kernel, InterpretedFunction)
        call.launch()
    assert [vars(owner) for owner in owners] == before
    assert isinstance(decode_kernel, triton.JITFunction) and isinstance(tl.sum, triton.JITFunction)
    assert sys.modules["hf_paged_kernels.triton.kernels.decode"].decode_kernel is decode_kernel
