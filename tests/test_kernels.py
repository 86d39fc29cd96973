"""One matrix for every implementation of the op layer, against the float64 oracle; unused slots hold NaN."""

import itertools

import pytest
import torch

from hf_paged.kernels import gather_sdpa, ops, reference

IMPLEMENTATIONS = {"ops": ops, "gather_sdpa": gather_sdpa}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
# (context, queries) of each row: decode, blocks' edges, prefill with and without a past, empty rows.
BATCHES = {
    "decode": [(1, 1), (15, 1), (16, 1), (17, 1), (50, 1)],
    "decode_even": [(32, 1), (32, 1)],
    "prefill": [(33, 33), (33, 33)],
    "chunk": [(37, 5), (5, 5), (20, 5)],
    "mixed": [(1, 1), (40, 9), (0, 0), (17, 17), (31, 1)],
    "empty_row": [(0, 1), (9, 1)],
}
HEADS = [(4, 4), (8, 2), (5, 1)]
OPTIONS = [{}, {"window": 7}, {"softcap": 0.5}, {"sinks": True}, {"window": 5, "softcap": 2.0, "sinks": True}]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


def make_pages(batch, heads, block_size, dtype, key_dim=16, value_dim=16):
    """Pages with the rows' blocks in random order and NaN in every slot without a token."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    blocks = [-(-context // block_size) for context, _ in batch]
    order = (torch.randperm(sum(blocks) + 3, generator=generator)).tolist()
    shape = (len(order), num_kv_heads, block_size)
    caches = [torch.full((*shape, dim), float("nan"), dtype=dtype) for dim in (key_dim, value_dim)]
    tables = torch.full((len(batch), max(blocks)), order[-1])
    for row, (context, _) in enumerate(batch):
        for index in range(blocks[row]):
            tables[row, index] = block = order.pop()
            filled = min(block_size, context - index * block_size)
            for cache in caches:
                values = torch.randn(num_kv_heads, filled, cache.shape[3], generator=generator)
                cache[block, :, :filled] = values.to(dtype)
    counts = torch.tensor([0] + [queries for _, queries in batch])
    query = torch.randn(int(counts.sum()), num_heads, key_dim, generator=generator).to(dtype)
    contexts = torch.tensor([context for context, _ in batch])
    sinks = torch.randn(num_heads, generator=generator)
    return (query, *caches, tables, contexts, counts.cumsum(0)), sinks


def check(implementation, arguments, sink_scores, dtype, **options):
    if "sinks" in options:
        options["sinks"] = sink_scores
    query, keys, values, *rows = arguments
    got = implementation.paged_attention(*arguments, 0.3, **options)
    exact = reference.paged_attention(query.double(), keys.double(), values.double(), *rows, 0.3, **options)
    assert got.dtype == dtype and not got.isnan().any()
    torch.testing.assert_close(
        got.double(), exact, atol=TOLERANCE[dtype], rtol=1e-2 if dtype != torch.float32 else 2e-6
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_paged_attention(implementation, batch, options, heads):
    arguments, sinks = make_pages(BATCHES[batch], heads, 16, torch.float32)
    check(implementation, arguments, sinks, torch.float32, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [4, 32])
@pytest.mark.parametrize("dims", [(16, 16), (24, 8)], ids=str)
def test_dtypes_blocks_and_head_sizes(implementation, dtype, block_size, dims):
    for batch, options in itertools.product(("decode", "mixed"), OPTIONS):
        arguments, sinks = make_pages(BATCHES[batch], (4, 2), block_size, dtype, *dims)
        check(implementation, arguments, sinks, dtype, **options)


@pytest.mark.parametrize("peak", range(0, 20))
def test_every_slot_can_be_the_peak(implementation, peak):
    """Attention peaked at one token: a dropped or repeated slot changes the answer wholly."""
    arguments, sinks = make_pages([(20, 1)], (2, 1), 4, torch.float32)
    query, keys, values, tables, *rest = arguments
    block, offset = int(tables[0, peak // 4]), peak % 4
    keys[block, 0, offset] = 40 * query[0, 0]
    got = implementation.paged_attention(*arguments, 1.0)
    torch.testing.assert_close(got[0, 0], values[block, 0, offset])


def test_the_oracle_is_plain_attention():
    """The reference itself against torch's SDPA on the tokens in order."""
    (query, keys, values, tables, contexts, starts), _ = make_pages([(11, 11)], (4, 2), 4, torch.float64)
    flat = [cache[tables[0]].transpose(1, 2).flatten(0, 1)[:11].transpose(0, 1) for cache in (keys, values)]
    states = [states.repeat_interleave(2, dim=0)[None] for states in flat]
    expected = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1)[None], *states, is_causal=True)
    got = reference.paged_attention(query, keys, values, tables, contexts, starts, 16**-0.5)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_write_kv(implementation, dtype):
    states = [torch.randn(9, 3, dim, dtype=dtype) for dim in (16, 8)]
    slots = torch.randperm(5 * 4)[:9]
    written, expected = [], []
    for target, module in ((written, implementation), (expected, reference)):
        target.extend(torch.full((5, 3, 4, dim), float("nan"), dtype=dtype) for dim in (16, 8))
        module.write_kv(*states, *target, slots)
    for a, b in zip(written, expected):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


def test_write_kv_takes_any_strides(implementation):
    states = [torch.randn(3, 9, 16).transpose(0, 1) for _ in range(2)]
    caches = [torch.zeros(5, 3, 4, 16) for _ in range(4)]
    slots = torch.arange(9)
    implementation.write_kv(*states, *caches[:2], slots)
    reference.write_kv(*states, *caches[2:], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_copy_blocks(implementation):
    caches = [torch.randn(6, 2, 4, 8) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    implementation.copy_blocks(*caches, torch.tensor([1, 1, 0]), torch.tensor([4, 5, 3]))
    for cache, old in zip(caches, before):
        assert torch.equal(cache[[4, 5, 3]], old[[1, 1, 0]]) and torch.equal(cache[:3], old[:3])
