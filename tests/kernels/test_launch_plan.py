"""How a call is cut into programs, and which calls the Triton kernels take."""

import itertools
import random

import pytest
import torch

from hf_paged_kernels import ops, torch_sdpa
from hf_paged_kernels.triton import dispatch, launch_plan
from hf_paged_kernels.triton.launch_plan import BY_ROW, BY_TILE, BY_TOKEN, Device, Heads

H100 = Device("sm90", 132)
LLAMA = Heads(num_kv_heads=8, group=4, key_dim=128, value_dim=128, block_size=16, itemsize=2)


def launches(num_tokens, num_rows, max_context=4096, heads=LLAMA, device=H100):
    return launch_plan.attention_launches(device, heads, num_tokens, num_rows, max_context)


def test_decode_launches_what_works_and_no_more():
    (launch,) = launches(128, 128)
    assert launch.mapping == BY_TOKEN and launch.tiles * launch_plan.head_tiles(LLAMA, launch) == 1024


def test_a_mixed_step_is_two_launches():
    decode, prefill = launches(63 + 1985, 64)
    assert (decode.mapping, prefill.mapping) == (BY_ROW, BY_TILE)
    assert prefill.min_q == decode.block_q + 1  # Every row belongs to exactly one of the two.
    assert decode.tiles == 64 and prefill.tiles == 63 + -(-1985 // prefill.block_q)


def test_one_row_is_one_launch():
    assert [launch.kernel for launch in launches(4, 1)] == ["decode"]
    (prefill,) = launches(1000, 1)
    assert prefill.tiles == -(-1000 // prefill.block_q)


def test_large_groups_are_served_by_one_kernel():
    heads = Heads(1, 71, 64, 64, 16, 2)
    (launch,) = launches(64, 64, heads=heads)
    assert launch.kernel == "prefill" and launch.min_q == 0 and launch_plan.head_tiles(heads, launch) == 2


def test_splits_fill_the_device_and_no_more():
    (lone,) = launches(1, 1, 65536)
    programs = lone.tiles * launch_plan.head_tiles(LLAMA, lone) * lone.splits
    assert H100.processors < programs <= H100.processors * lone.resident
    assert launches(1, 1, 128)[0].splits == 1  # Too short to be worth it.
    assert launches(1024, 1024, 65536)[0].splits == 1  # Rows alone fill the device.


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
        for launch in launches(40, 7, heads=heads, device=Device(arch, 100)):
            assert launch.heads * launch.block_q <= launch.block_m
            assert launch_plan.head_tiles(heads, launch) * launch.heads >= 2 * group
            assert launch.tile % max(launch.parts, 1) == 0 and launch.splits >= 1


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", None)
    monkeypatch.setattr(dispatch, "_failure", None)


def test_without_a_gpu_there_is_one_warning_and_torch(fresh):
    with pytest.warns(UserWarning, match="Triton kernels are not available"):
        assert dispatch.load() is None
    assert dispatch.load() is None and not dispatch.state().available and dispatch.state().reason


@pytest.mark.parametrize("word", ["0", "false", "Off"])
def test_they_can_be_turned_off(word, fresh, monkeypatch, recwarn):
    monkeypatch.setenv("HF_PAGED_TRITON", word)
    assert (
        dispatch.state() == dispatch.TritonState(False, f"HF_PAGED_TRITON={word} turns them off") and not recwarn.list
    )


def caches(dim=64, dtype=torch.bfloat16):
    return [torch.zeros(2, 2, 16, dim, dtype=dtype) for _ in "kv"]


def test_what_the_kernels_serve(monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", torch_sdpa)
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    assert dispatch.find("paged_attention", (query, *caches())) is torch_sdpa.paged_attention
    assert dispatch.find("write_and_attend", (query, query, query, *caches())) is torch_sdpa.write_and_attend
    assert dispatch.find("copy_blocks", tuple(caches(dtype=torch.float64))) is torch_sdpa.copy_blocks
    assert dispatch.find("paged_attention", (query.double(), *caches(dtype=torch.float64))) is None
    assert dispatch.find("paged_attention", (query, *caches(320))) is None
    assert dispatch.find("write_kv", (query.float(), query.float(), *caches())) is None


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)


def test_the_ops_ask_for_the_kernels_on_a_gpu(monkeypatch):
    """Through the function that every device's call of an op without a kernel of its own ends in."""
    asked = []
    monkeypatch.setattr(dispatch, "find", lambda name, arguments: lambda *a: asked.append(name))
    for name in ("write_kv", "copy_blocks", "paged_attention", "write_and_attend"):
        ops._first_call(name, None)(torch.zeros(1).as_subclass(OnGpu))
    assert asked == ["write_kv", "copy_blocks", "paged_attention", "write_and_attend"]
