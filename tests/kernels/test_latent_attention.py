"""Absorbed attention over latents: every implementation against the float64 oracle; unused slots hold NaN."""

import pytest
import torch

from hf_paged_kernels import reference, torch_sdpa
from hf_paged_kernels.cpu import loader
from support.op_matrix import (
    BATCHES,
    IMPLEMENTATIONS,
    assert_accurate,
    exact_latents,
    hide_before_window,
    implementation,
    make_latents,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request):
    with implementation(request.param) as module:
        yield module


def check(kernels, batch, num_heads=4, block_size=16, dtype=torch.float32, dims=(16, 8), scale=0.3, share=1, **options):
    arguments = make_latents(batch, num_heads, block_size, dtype, *dims)
    if "window" in options:
        hide_before_window(arguments, options["window"])
    got = kernels.latent_attention(*arguments, scale, **options)
    assert got.dtype == dtype
    assert_accurate(got, exact_latents(arguments, scale, **options), share)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", [{}, {"window": 7}], ids=str)
def test_batches(kernels, batch, options):
    for number, dtype in enumerate(DTYPES):
        check(kernels, BATCHES[batch], (4, 5, 16)[number], dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 8), (512, 64), (256, 32), (80, 20), (64, 128), (5, 3), (1, 1)], ids=str)
def test_ranks_and_rope_sizes(kernels, dtype, dims):
    for batch in ("decode", "mixed"):
        # Of so many numbers, some are further from the exact ones than those of small heads.
        check(kernels, BATCHES[batch], 6, 16, dtype, dims, sum(dims) ** -0.5, 1.5 if dims[0] > 256 else 1)


@pytest.mark.parametrize("num_heads", [1, 7, 16, 17, 40, 96, 97, 128, 200])
def test_any_number_of_heads(kernels, num_heads):
    """More than fit a tile are shared out."""
    for dtype in DTYPES[:2]:
        check(kernels, [(40, 1), (21, 3)], num_heads, 16, dtype, (32, 16))


@pytest.mark.parametrize("block_size", [4, 16, 32, 128])
def test_block_sizes(kernels, block_size):
    """Contexts that end just before, at and just after the end of a block."""
    edges = [(context, 1) for context in (1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3)]
    for batch in (edges, [(2 * block_size + 1, block_size + 2), (block_size, 2)]):
        for dtype in DTYPES[:2]:
            check(kernels, batch, 6, block_size, dtype, (32, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_split(kernels, dtype):
    """Contexts of several chunks, which different threads may take, with and without a window."""
    for options in ({}, {"window": 1100}):
        for num_heads in (6, 100):
            check(kernels, [(1700, 1), (3, 1), (1024, 1), (1025, 1)], num_heads, 16, dtype, (64, 32), 0.1, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_prefill(kernels, dtype):
    """More queries than a tile holds, over several tiles of tokens."""
    for options in ({}, {"window": 100}):
        check(kernels, [(300, 200), (130, 130)], 4, 16, dtype, (64, 32), 0.1, **options)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_slot_can_be_the_peak(kernels, dtype, queries):
    """Attention peaked at one token, by its rope part alone: a dropped or repeated slot changes the answer wholly."""
    context, block_size = 83, 16
    arguments = make_latents([(context, queries)], 2, block_size, dtype, 32, 32)
    query_latent, query_rope, latents, ropes, tables, *_ = arguments
    query_latent[:] = 0
    query_rope[:] = query_rope[0, 0]
    for peak in range(context - queries + 1):
        block, offset = int(tables[0, peak // block_size]), peak % block_size
        before = ropes[block, 0, offset].clone()
        ropes[block, 0, offset] = 4 * query_rope[0, 0]
        got = kernels.latent_attention(*arguments, 1.0)
        ropes[block, 0, offset] = before
        torch.testing.assert_close(got, latents[block, 0, offset].expand_as(got))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(kernels, scale):
    check(kernels, BATCHES["mixed"], scale=scale)


def test_scores_beyond_the_range_of_exp(kernels):
    arguments = make_latents([(70, 1), (70, 4)], 2, 16, torch.float32)
    for query in arguments[:2]:
        query[:] *= 100
    assert_accurate(kernels.latent_attention(*arguments, 1.0), exact_latents(arguments, 1.0))


def test_strides_do_not_matter(kernels):
    """Of queries, as products of each head with the weights leave them, and of the rows of block tables."""
    for batch in (BATCHES["decode"], BATCHES["mixed"]):
        *queries, latents, ropes, tables, contexts, starts = make_latents(batch, 4, 16, torch.float32)
        wide = torch.full((len(tables), tables.shape[1] + 3), -1)
        wide[:, : tables.shape[1]] = tables
        rows = (wide[:, : tables.shape[1]], contexts, starts)
        strided = [query.transpose(0, 1).contiguous().transpose(0, 1) for query in queries]
        got = kernels.latent_attention(*strided, latents, ropes, *rows, 0.3)
        assert_accurate(got, exact_latents((*queries, latents, ropes, *rows), 0.3))


def test_the_number_of_threads_does_not_matter(kernels):
    arguments = make_latents([(1700, 1), (300, 40)], 16, 16, torch.bfloat16, 64, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(kernels.latent_attention(*arguments, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_oracle_is_attention_over_expanded_keys_and_values():
    """Absorbed attention is attention over what a linear layer makes of the latents, to rounding."""
    num_heads, nope_dim, value_dim, tokens = 3, 5, 7, 11
    generator = torch.Generator().manual_seed(0)
    latents, ropes, query_nope, query_rope, key_weight, value_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (
            (tokens, 16), (tokens, 8), (tokens, num_heads, nope_dim), (tokens, num_heads, 8),
            (num_heads, nope_dim, 16), (num_heads, value_dim, 16),
        )
    )  # fmt: skip
    keys = torch.cat((torch.einsum("tr,hdr->htd", latents, key_weight), ropes.expand(num_heads, -1, -1)), 2)
    values = torch.einsum("tr,hdr->htd", latents, value_weight)
    query = torch.cat((query_nope, query_rope), 2).transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.3)
    pages = (latents[None, None], ropes[None, None])
    rows = (torch.zeros(1, 1, dtype=torch.long), torch.tensor([tokens]), torch.tensor([0, tokens]))
    query_latent = torch.einsum("thd,hdr->thr", query_nope, key_weight)
    out = reference.latent_attention(query_latent, query_rope, *pages, *rows, 0.3)
    torch.testing.assert_close(torch.einsum("thr,hdr->htd", out, value_weight), expected)


@pytest.mark.skipif(not loader.load(), reason="no compiler")
def test_what_the_kernels_do_not_serve_goes_to_torch():
    """Double precision, and pages that do not lie side by side."""
    arguments = make_latents(BATCHES["mixed"], 4, 16, torch.float64)
    torch.testing.assert_close(torch.ops.hf_paged.latent_attention(*arguments, 0.3), exact_latents(arguments, 0.3))
    *queries, latents, ropes, tables, contexts, starts = make_latents(BATCHES["mixed"], 4, 16, torch.float32)
    apart = [torch.cat((cache, cache), 3)[..., : cache.shape[3]] for cache in (latents, ropes)]
    expected = torch_sdpa.latent_attention(*queries, *apart, tables, contexts, starts, 0.3)
    assert torch.equal(torch.ops.hf_paged.latent_attention(*queries, *apart, tables, contexts, starts, 0.3), expected)


@pytest.mark.parametrize(
    "number, change, message",
    [
        (0, lambda x: x[:, :, :-1], "queries must be"),
        (1, lambda x: x[:-1], "queries must be"),
        (2, lambda x: x.expand(-1, 2, -1, -1).contiguous(), "differ in more than head size"),
        (4, lambda x: x + 1000, "block .* is not below"),
        (5, lambda x: x + 1000, "its block table holds"),
        (6, lambda x: x[:-1], "must speak of the same rows"),
    ],
)
def test_wrong_arguments_are_refused(number, change, message):
    if not loader.load():
        return
    arguments = list(make_latents([(20, 1), (18, 3)], 4, 16, torch.float32))
    arguments[number] = change(arguments[number])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_paged.latent_attention(*arguments, 0.3)
