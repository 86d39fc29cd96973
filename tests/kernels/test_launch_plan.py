"""How a call is cut into programs, and which calls the Triton kernels take."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from hf_paged_kernels import backends, torch_sdpa
from hf_paged_kernels.backends import BackendState
from hf_paged_kernels.triton import dispatch, launch_plan
from hf_paged_kernels.triton.launch_plan import BY_ROW, BY_TILE, BY_TOKEN, Device, Heads
from support.op_matrix import CODES, op_arguments

H100 = Device("sm90", 132)
LLAMA = Heads(num_kv_heads=8, group=4, key_dim=128, value_dim=128, block_size=16, itemsize=2)


def plans(num_tokens, num_rows, max_context=4096, heads=LLAMA, device=H100, window=None):
    return launch_plan.attention_plans(device, heads, num_tokens, num_rows, max_context, window)


def test_decode_has_a_program_per_query_and_no_more():
    (plan,) = plans(128, 128)
    assert plan.mapping == BY_TOKEN and plan.tiles * launch_plan.head_tiles(LLAMA, plan) == 1024


def test_a_mixed_step_has_two_plans():
    decode, prefill = plans(63 + 1985, 64)
    assert (decode.mapping, prefill.mapping) == (BY_ROW, BY_TILE)
    assert prefill.min_q == decode.block_q + 1  # Every row belongs to exactly one of the two.
    assert decode.tiles == 64 and prefill.tiles == 63 + -(-1985 // prefill.block_q)


def test_one_row_has_one_plan():
    assert [plan.kernel for plan in plans(4, 1)] == ["decode"]
    (prefill,) = plans(1000, 1)
    assert prefill.tiles == -(-1000 // prefill.block_q)


def test_large_groups_are_served_by_one_kernel():
    heads = Heads(1, 71, 64, 64, 16, 2)
    (plan,) = plans(64, 64, heads=heads)
    assert plan.kernel == "prefill" and plan.min_q == 0 and launch_plan.head_tiles(heads, plan) == 2


def programs_at_once(plan, heads=LLAMA, device=H100):
    """Programs of one tile of heads that the device runs at once."""
    return device.processors * plan.resident // launch_plan.head_tiles(heads, plan)


def test_splits_fill_the_device_and_no_more():
    for rows in (1, 5, 16):
        (plan,) = plans(rows, rows, 65536)
        assert plan.tiles + plan.extra == programs_at_once(plan)
    for rows in (33, 1024):  # Rows fill the device, and one that is much longer than the others is shared out still.
        (plan,) = plans(rows, rows, 65536)
        assert plan.extra == min(rows - 1, programs_at_once(plan))
    assert plans(1, 1, 256)[0].extra == plans(64, 64, 256)[0].extra == 0  # Too short to be worth it.


def test_a_short_window_has_no_splits():
    """Tiles before the window are not visited, so there is nothing to share out."""
    assert not any(plan.extra for plan in plans(64, 64, 65536, window=128))
    assert not any(plan.extra for plan in plans(63 + 1985, 64, 65536, window=128))
    assert plans(64, 64, 65536, window=4096)[0].extra == plans(64, 64, 65536)[0].extra


def test_tiles_are_enough_for_any_batch():
    """The numbering of tiles in rows.py, against lengths at random: each row gets the tiles it needs."""
    chance = random.Random(0)
    for _ in range(300):
        counts = [chance.choice([0, 1, 2, 5, 16, 17, 100]) for _ in range(chance.randint(1, 12))]
        starts = list(itertools.accumulate(counts, initial=0))
        for block_q in (1, 4, 16, 21):
            first = [(starts[row] + row * (block_q - 1)) // block_q for row in range(len(counts) + 1)]
            assert all(b - a >= -(-n // block_q) for a, b, n in zip(first, first[1:], counts))
            assert first[-1] == (sum(counts) + len(counts) * (block_q - 1)) // block_q


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
def test_plans_hold_their_invariants(arch, itemsize):
    for group, dim in itertools.product([1, 2, 3, 7, 8, 17, 32, 33, 200], [1, 64, 80, 256]):
        heads = Heads(2, group, dim, dim, 16, itemsize)
        for plan in plans(40, 7, heads=heads, device=Device(arch, 100)):
            assert plan.heads * plan.block_q <= plan.block_m
            assert launch_plan.head_tiles(heads, plan) * plan.heads >= 2 * group
            assert plan.tile % max(plan.parts, 1) == 0 and plan.extra >= 0


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", None)
    monkeypatch.setattr(dispatch, "_failure", None)


def test_without_a_gpu_there_is_one_warning_and_torch(fresh):
    with pytest.warns(UserWarning, match="Triton kernels are not available"):
        assert dispatch.load() is None
    assert dispatch.load() is None and not dispatch.state().available and dispatch.state().reason


def test_a_driver_that_has_failed_is_not_left_to_torch(fresh, monkeypatch, recwarn):
    """It is torch's driver as well. Next time it is asked again."""

    def fails():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    active = SimpleNamespace(get_current_target=fails)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            dispatch.find("copy_blocks", tuple(caches()))
    assert not recwarn.list
    state = dispatch.state()
    assert not state.available and "the device or its driver has failed: Triton Error" in state.reason


@pytest.mark.parametrize("word", ["0", "false", "Off"])
def test_they_can_be_turned_off(word, fresh, monkeypatch, recwarn):
    monkeypatch.setenv("HF_PAGED_TRITON", word)
    assert dispatch.state() == BackendState(False, f"HF_PAGED_TRITON={word} turns them off")
    assert not recwarn.list


def caches(dim=64, dtype=torch.bfloat16):
    return [torch.zeros(2, 2, 16, dim, dtype=dtype) for _ in "kv"]


def test_what_the_kernels_serve(monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", torch_sdpa)
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    assert dispatch.find("paged_attention", (query, *caches())) is torch_sdpa.paged_attention
    assert dispatch.find("write_and_attend", (query, query, query, *caches())) is torch_sdpa.write_and_attend
    assert dispatch.find("copy_blocks", tuple(caches(dtype=torch.float64))) is torch_sdpa.copy_blocks
    assert dispatch.find("paged_attention", (query.double(), *caches(dtype=torch.float64))) is None
    assert dispatch.find("paged_attention", (query, *caches(512))) is torch_sdpa.paged_attention
    assert dispatch.find("paged_attention", (query, *caches(544))) is None
    assert dispatch.find("paged_attention", (query.float(), *caches(256, torch.float32))) is torch_sdpa.paged_attention
    assert dispatch.find("paged_attention", (query.float(), *caches(320, torch.float32))) is None
    assert dispatch.find("write_kv", (query.float(), query.float(), *caches())) is None


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_quantized_pages_are_served_whatever_the_dtype_of_queries(codes, monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", torch_sdpa)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query = torch.zeros(3, 4, 64, dtype=dtype)
        for op, states in (("write_kv", 2), ("paged_attention", 1), ("write_and_attend", 3)):
            assert dispatch.find(op, (*[query] * states, *caches(dtype=codes))) is getattr(torch_sdpa, op)
    assert dispatch.find("copy_blocks", tuple(caches(dtype=codes))) is torch_sdpa.copy_blocks
    assert dispatch.find("paged_attention", (query.double(), *caches(dtype=codes))) is None
    assert dispatch.find("write_kv", (query.double(), query.double(), *caches(dtype=codes))) is None
    assert dispatch.find("paged_attention", (query.float(), *caches(320, codes))) is None


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)


def test_the_ops_ask_for_the_kernels_on_a_gpu(monkeypatch):
    """Through the function that torch's dispatcher calls for an op on devices without kernels of their own."""
    asked = []
    recorders = {op: lambda *arguments, op=op: asked.append(op) for op in backends.OPS}
    monkeypatch.setattr(dispatch, "_launch", SimpleNamespace(**recorders))
    for op, (first, *rest) in op_arguments().items():
        backends.python_kernel(op)(first.as_subclass(OnGpu), *rest)
    assert asked == list(backends.OPS)
