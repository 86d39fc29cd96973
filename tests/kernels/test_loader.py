"""Promises of the C++ kernels alone: the same result from any threads, errors for wrong rows, real custom ops."""

import pytest
import torch

from hf_paged_kernels import ops, torch_sdpa
from hf_paged_kernels.cpu import loader
from support.op_matrix import ISAS, assert_accurate, exact, implementation, make_pages, op_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_kernels_are_compiled_here():
    """Without a compiler the matrix would test torch alone and still be green."""
    assert loader.state().available, loader.state().reason


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads_or_batch(threads, isa, dtype):
    batch = [(1300, 1), (700, 260), (5, 1), (40, 7)]
    (query, *rest), _ = make_pages(batch, (6, 2), 16, dtype, 64, 64)
    with implementation(isa):
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            results.append(ops.paged_attention(query, *rest, 0.125))
        keys, values, tables, contexts, starts = rest
        alone = [
            ops.paged_attention(
                query[starts[row] : starts[row + 1]], keys, values, tables[row : row + 1], contexts[row : row + 1],
                torch.stack([starts[0], starts[row + 1] - starts[row]]), 0.125,
            )
            for row in range(len(batch))
        ]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in [*results[1:], torch.cat(alone)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_heads", [71, 128, 160, 200])
def test_prefill_of_many_heads_that_share_one_kv_head(isa, num_heads):
    """A tile of queries is then a few tokens, or one: rows in numbers that no block of rows divides."""
    arguments, _ = make_pages([(70, 9)], (num_heads, 1), 16, torch.float32, 32, 32)
    with implementation(isa):
        assert_accurate(ops.paged_attention(*arguments, 0.2), exact(arguments, 0.2))


@pytest.mark.parametrize("dim", [64, 128])
def test_long_prefill_is_accurate_in_bfloat16(dim):
    """Many weights of one size: rounded to bfloat16, as SDPA rounds them, they miss the bound."""
    for seed, row in [(3, (600, 200)), (4, (600, 200)), (5, (2300, 150))]:
        arguments, _ = make_pages([row], (4, 2), 16, torch.bfloat16, dim, dim, seed=seed)
        expected = exact(arguments, dim**-0.5)
        for isa in ISAS:
            with implementation(isa):
                assert_accurate(ops.paged_attention(*arguments, dim**-0.5), expected)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("outlier", [1, 100])
def test_weights_keep_more_bits_than_bfloat16(spread, outlier):
    """Rounded, they miss the bound, the farther the flatter attention is; an odd value must not cost its neighbours."""
    torch.manual_seed(0)
    keys, values = (torch.randn(160, 1, 16, 128).bfloat16() for _ in range(2))
    values[::40, :, 3] *= outlier
    query = (spread * torch.randn(256, 4, 128)).bfloat16()
    arguments = (query, keys, values, torch.arange(160)[None], torch.tensor([2550]), torch.tensor([0, 256]))
    assert_accurate(ops.paged_attention(*arguments, 128**-0.5), exact(arguments, 128**-0.5), share=0.5)


def test_a_value_without_end_stays_in_its_element():
    """Dense attention gives infinity, or no number, for that element of the head and for no other."""
    arguments, _ = make_pages([(100, 40)], (4, 2), 16, torch.bfloat16, 64, 64)
    expected = exact(arguments, 0.125)
    values, tables = arguments[2], arguments[3]
    values[tables[0, 1], :, 5, 17] = float("inf")
    for isa in ISAS:
        with implementation(isa):
            got = ops.paged_attention(*arguments, 0.125)
            assert not got[..., 17].isfinite().any()
            others = torch.arange(64) != 17
            assert_accurate(got[..., others], expected[..., others])


@pytest.mark.parametrize("dim, dtype", [(16, torch.float64), (320, torch.float32)], ids=str)
def test_what_the_kernels_do_not_serve_runs_in_torch(dim, dtype):
    arguments, _ = make_pages([(20, 1), (9, 3)], (4, 2), 16, dtype, dim, dim)
    assert torch.equal(ops.paged_attention(*arguments, 0.3), torch_sdpa.paged_attention(*arguments, 0.3))


def test_ids_out_of_range_are_refused():
    """A wrong id must not read or write memory that is not the pool's."""
    (query, keys, values, tables, contexts, starts), _ = make_pages([(20, 1)], (4, 2), 16, torch.float32)
    with pytest.raises(RuntimeError, match="block 99 is not below"):
        ops.paged_attention(query, keys, values, torch.full_like(tables, 99), contexts, starts, 0.3)
    with pytest.raises(RuntimeError, match="its block table holds"):
        ops.paged_attention(query, keys, values, tables, contexts + 100, starts, 0.3)
    with pytest.raises(RuntimeError, match="cu_seqlens_q"):
        ops.paged_attention(query, keys, values, tables, contexts, starts + 1, 0.3)
    states = torch.zeros(1, 2, 16)
    for slot in (-2, 5 * 16):
        with pytest.raises(RuntimeError, match=f"slot {slot} is neither -1 nor from 0 to 79"):
            ops.write_kv(states, states, keys, values, torch.tensor([slot]))
    with pytest.raises(RuntimeError, match="destination block 99"):
        ops.copy_blocks(keys, values, torch.tensor([0]), torch.tensor([99]))


@pytest.mark.parametrize("suffix", ["", "_torch"])
@pytest.mark.parametrize("name", op_arguments())
def test_opcheck(name, suffix):
    torch.library.opcheck(getattr(torch.ops.hf_paged, name + suffix).default, op_arguments()[name])


@pytest.mark.parametrize("name", op_arguments())
def test_ops_mutate_what_their_schema_says_and_nothing_else(name):
    schema = getattr(torch.ops.hf_paged, name).default._schema
    arguments = op_arguments()[name]
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    getattr(ops, name)(*arguments)
    for declared, now, then in zip(schema.arguments, arguments, before):
        if isinstance(now, torch.Tensor):
            assert torch.equal(now, then) is not (declared.alias_info is not None and declared.alias_info.is_write)


def test_the_ops_compile_whole():
    query, *rest = op_arguments()["paged_attention"]
    compiled = torch.compile(lambda query: ops.paged_attention(query, *rest) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query), ops.paged_attention(query, *rest) * 2)
