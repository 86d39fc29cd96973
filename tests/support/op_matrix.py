"""Shared by the op tests: every implementation that this machine runs, pages of any shape, and the bounds."""

import contextlib

import torch

from hf_paged_kernels import ops, reference, torch_sdpa
from hf_paged_kernels.cpu import loader
from hf_paged_kernels.quantized import quantize, rotate

CODES = [torch.int8, torch.float8_e4m3fn]  # What quantised pages hold.
ISAS = loader.isas() if loader.load() else ()
IMPLEMENTATIONS = ["torch", *ISAS]
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # Of a number between 1 and 2.


@contextlib.contextmanager
def implementation(name: str):
    """The op layer, on torch or on the C++ kernels of one instruction set."""
    if name == "torch":
        yield torch_sdpa
        return
    before = loader.isa()
    loader.use_isa(name)
    try:
        yield ops
    finally:
        loader.use_isa(before)


# (context, queries) of each row: decode, blocks' edges, prefill with and without a past, empty rows.
BATCHES = {
    "decode": [(1, 1), (15, 1), (16, 1), (17, 1), (50, 1)],
    "decode_even": [(32, 1), (32, 1)],
    "prefill": [(33, 33), (33, 33)],
    "chunk": [(37, 5), (5, 5), (20, 5)],
    "mixed": [(1, 1), (40, 9), (0, 0), (17, 17), (31, 1)],
    "empty_row": [(0, 1), (9, 1), (0, 3), (2, 4)],
    "padded": [(17, 1), (0, 1), (33, 1), (0, 1)],  # A decode step of two rows, padded to four.
    "all_padding": [(0, 1), (0, 1)],
    "no_rows": [],
}
SLOTS = {
    "stored": [7, 2, 19, 0, 12],
    "padded": [7, -1, 19, 0, -1],
    "padding_first": [-1, 3, 0],
    "all_padding": [-1, -1, -1],
    "none": [],
}
HEADS = [(4, 4), (8, 2), (5, 1), (9, 3)]
OPTIONS = [{}, {"window": 7}, {"softcap": 0.5}, {"sinks": True}, {"window": 5, "softcap": 2.0, "sinks": True}]


def make_pages(batch, heads, block_size, dtype, key_dim=16, value_dim=16, seed=0):
    """Arguments of `paged_attention` up to `scale`, and sinks.

    The rows' blocks lie in random order; every slot without a token of its row holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    blocks = [-(-context // block_size) for context, _ in batch]
    order = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
    shape = (len(order), num_kv_heads, block_size)
    caches = [torch.full((*shape, dim), float("nan"), dtype=dtype) for dim in (key_dim, value_dim)]
    tables = torch.full((len(batch), max(blocks, default=0)), order[-1])
    for row, (context, _) in enumerate(batch):
        for index in range(blocks[row]):
            tables[row, index] = block = order.pop()
            filled = min(block_size, context - index * block_size)
            for cache in caches:
                values = torch.randn(num_kv_heads, filled, cache.shape[3], generator=generator)
                cache[block, :, :filled] = values.to(dtype)
    counts = torch.tensor([0] + [queries for _, queries in batch])
    query = torch.randn(int(counts.sum()), num_heads, key_dim, generator=generator).to(dtype)
    contexts = torch.tensor([context for context, _ in batch], dtype=torch.long)
    return (query, *caches, tables, contexts, counts.cumsum(0)), torch.randn(num_heads, generator=generator)


def quantized_pages(caches, dtype: torch.dtype):
    """Pages of keys and of values as codes, and their scales: NaN, as are some codes, in slots without a token."""
    keys, values = (quantize(states.double(), dtype) for states in (rotate(caches[0].double()), caches[1]))
    return (keys[0], values[0]), {"key_scales": keys[1], "value_scales": values[1]}


def make_latents(batch, num_heads, block_size, dtype, rank=16, rope_dim=8, seed=0):
    """Arguments of `latent_attention` up to `scale`; every slot without a token of its row holds NaN."""
    (query, *rest), _ = make_pages(batch, (num_heads, 1), block_size, dtype, rank, rope_dim, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return (query, torch.randn(*query.shape[:2], rope_dim, generator=generator).to(dtype), *rest)


def exact_latents(arguments, scale: float, **options) -> torch.Tensor:
    """The oracle's answer to `latent_attention` in float64."""
    states, rows = arguments[:4], arguments[4:]
    return reference.latent_attention(*(x.double() for x in states), *rows, scale, **options)


def op_arguments() -> dict[str, tuple]:
    """Arguments of every op; no slot holds NaN."""
    dtype = torch.float32
    arguments, sinks = make_pages([(20, 1), (9, 3)], (4, 2), 16, dtype, 16, 8)
    query, keys, values, *rows = (x.nan_to_num() if x.is_floating_point() else x for x in arguments)
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(4, 2, dim, generator=generator) for dim in (16, 8)]
    slots = torch.tensor([1, 2, 5, 17])
    latents = [x.nan_to_num() if x.is_floating_point() else x for x in make_latents([(20, 1), (9, 3)], 4, 16, dtype)]
    return {
        "write_kv": (*states, keys.clone(), values.clone(), slots),
        "copy_blocks": (keys.clone(), values.clone(), torch.tensor([0, 1]), torch.tensor([3, 4])),
        "paged_attention": (query, keys, values, *rows, 0.3, 7, 2.0, sinks),
        "write_and_attend": (query, *states, keys.clone(), values.clone(), slots, *rows, 0.3),
        "latent_attention": (*latents, 0.3, 7),
    }


def check_write_kv(kernels, slots: list[int], dtype: torch.dtype, dims=(16, 8), is_transposed: bool = False) -> None:
    """Store tokens in pages of NaN, of five blocks of four slots, and find what the reference leaves there."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(slots), 3, dim, generator=generator).to(dtype) for dim in dims]
    if is_transposed:
        states = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in states]
    written, expected = ([torch.full((5, 3, 4, dim), float("nan"), dtype=dtype) for dim in dims] for _ in range(2))
    for module, caches in ((kernels, written), (reference, expected)):
        module.write_kv(*states, *caches, torch.tensor(slots, dtype=torch.long))
    torch.testing.assert_close(written, expected, atol=0, rtol=0, equal_nan=True)


def check_quantized_write(kernels, slots: list[int], dtype: torch.dtype, codes: torch.dtype, dims=(16, 8)) -> None:
    """Store tokens in quantised pages: codes are those of the reference up to rounding, and no other slot changes."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(slots), 3, dim, generator=generator).to(dtype) for dim in dims]
    for vectors in states:  # A channel that outweighs the others, and a vector of zeros.
        vectors[..., :1] *= 50
        vectors[:1, 0] = 0
    written, expected = (
        [torch.zeros(5, 3, 4, dim).to(codes) for dim in dims] + [torch.full((5, 3, 4, 1), float("nan"))] * 2
        for _ in range(2)
    )
    for module, pages in ((kernels, written), (reference, expected)):
        pages[2:] = [scales.clone() for scales in pages[2:]]
        module.write_kv(*states, *pages[:2], torch.tensor(slots, dtype=torch.long), *pages[2:])
    torch.testing.assert_close(written[2:], expected[2:], rtol=1e-5, atol=0, equal_nan=True)
    for got, wanted in zip(written[:2], expected[:2]):
        # Codes of float8 in steps of their own: those of one sign are ordered as the bytes are.
        steps = (got.view(torch.int8).int() - wanted.view(torch.int8).int()).abs()
        assert steps.max() <= 1 and (steps > 0).double().mean() < 0.02


def check_padded_step(kernels, dtype: torch.dtype) -> None:
    """A decode step of two rows padded to four: padding stores nothing and gives zeros, the rest is as without it."""
    arguments, _ = make_pages(BATCHES["padded"], (4, 2), 16, dtype, 32, 24)
    query, keys, values, tables, contexts, starts = arguments
    new = [torch.randn(4, 2, dim, generator=torch.Generator().manual_seed(1)).to(dtype) for dim in (32, 24)]
    slots = torch.tensor([int(tables[0, 1]) * 16, -1, int(tables[2, 2]) * 16, -1])
    expected_caches = [cache.clone() for cache in (keys, values)]
    for row in (0, 2):
        reference.write_kv(*(x[row : row + 1] for x in new), *expected_caches, slots[row : row + 1])
    expected = exact((query, *expected_caches, tables, contexts, starts), 0.3)
    got = kernels.write_and_attend(query, *new, keys, values, slots, tables, contexts, starts, 0.3)
    assert_accurate(got, expected)
    assert not got[[1, 3]].any() and got[[0, 2]].any()
    torch.testing.assert_close([keys, values], expected_caches, atol=0, rtol=0, equal_nan=True)


def hide_before_window(arguments, window: int) -> None:
    """Put NaN into the slots that no query of their row sees any more; in place."""
    keys, values, tables, contexts, starts = arguments[-5:]
    block_size = keys.shape[2]
    for row, (context, begin, end) in enumerate(zip(contexts.tolist(), starts.tolist(), starts.tolist()[1:])):
        for token in range(max(0, context - (end - begin) - window + 1)):
            for cache in (keys, values):
                cache[tables[row, token // block_size], :, token % block_size] = float("nan")


def exact(arguments, scale: float, **options) -> torch.Tensor:
    """The oracle's answer in float64."""
    query, keys, values, *rows = arguments
    if "key_scales" not in options:
        keys, values = keys.double(), values.double()
    return reference.paged_attention(query.double(), keys, values, *rows, scale, **options)


def assert_accurate(got: torch.Tensor, expected: torch.Tensor, share: float = 1) -> None:
    """fp32: 2e-6 of the largest output. Half precision: a share of 2 ulp of each output + 1e-3 of the largest."""
    assert not got.isnan().any()
    error, largest = (got.double() - expected).abs(), expected.abs().max() if expected.numel() else 0
    if got.dtype == torch.float32:
        assert error.numel() == 0 or error.max() <= 2e-6 * largest
        return
    exponent = torch.floor(torch.log2(expected.abs().clamp_min(2.0**-14)))
    bound = 4 * HALF_ULP[got.dtype] * torch.exp2(exponent) + 1e-3 * largest
    assert (error <= share * bound).all(), f"{(error / bound).max():.2f} times the bound"
