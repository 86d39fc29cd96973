"""The Triton kernels without a GPU: their machine code for several, and that the checks of it can fail."""

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

from hf_paged.cli import main
from hf_paged_evals.triton import command, compile, disassembly, loops
from hf_paged_evals.triton.cases import Case, few_cases
from hf_paged_evals.triton.measure import judge, measure
from hf_paged_evals.triton.targets import TARGETS
from hf_paged_evals.triton.thresholds import THRESHOLDS
from hf_paged_kernels.triton.ahead import AttentionLayer, compile_layers, gpu_target, layer_calls
from hf_paged_kernels.triton.kernel_calls import attention_calls, copy_call, latent_calls, write_call
from hf_paged_kernels.triton.launch_plan import Device


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("case, target", few_cases(), ids=lambda value: getattr(value, "arch", None) or str(value))
def test_compiled_code_keeps_to_the_thresholds(case, target):
    assert not measure(case, target).misses


def test_spills_are_seen():
    call = Case("decode").call(TARGETS["sm90"])
    one_warp = dataclasses.replace(call, options={**call.options, "num_warps": 1})
    assert compile.compile_call(one_warp, TARGETS["sm90"]).spilled > 0


def test_a_single_buffer_is_seen():
    call = Case("decode").call(TARGETS["sm80"])
    code = compile.compile_call(dataclasses.replace(call, options={**call.options, "num_stages": 2}), TARGETS["sm80"])
    assert code.waits == 0 and code.buffers == 1


def test_narrow_loads_are_seen():
    """Keys that do not begin at a multiple of 16 bytes cannot be loaded by 128 bits."""
    call = Case("decode").call(TARGETS["sm80"])
    query, keys, *rest = call.arguments
    shifted = keys.new_empty(keys.numel() + 1)[1:].view(keys.shape)
    code = compile.compile_call(dataclasses.replace(call, arguments=(query, shifted, *rest)), TARGETS["sm80"])
    assert disassembly.wide_share(code.hot_loop()) < 1


LAYERS = {
    "llama": AttentionLayer(32, 8, 128, 128, 16, torch.bfloat16),
    "window": AttentionLayer(16, 8, 64, 64, 16, torch.float16, window=512, has_softcap=True, sinks=torch.bfloat16),
    "short_window": AttentionLayer(8, 8, 64, 64, 16, torch.float16, window=128),
    "large_group": AttentionLayer(40, 1, 80, 64, 32, torch.float32),
    "int8": AttentionLayer(32, 8, 128, 128, 16, torch.bfloat16, codes=torch.int8),
    "fp8": AttentionLayer(16, 8, 64, 64, 16, torch.float32, window=512, codes=torch.float8_e4m3fn),
}


def step_calls(target, layer, rows, width, heads_first, offset):
    """The launches of a step of rows of so many queries each, whose inputs begin anywhere in a buffer."""
    dims = (layer.key_dim, layer.value_dim)
    shape = (2, layer.num_kv_heads, layer.block_size)
    caches = [torch.empty(*shape, dim, dtype=layer.codes or layer.dtype) for dim in dims]
    scales = [torch.empty(*shape, 1) for _ in "kv" if layer.codes is not None]
    buffer = torch.zeros(len(rows) * (width + 2) + 2 * sum(rows) + 8, dtype=torch.long)[offset:]
    tables = buffer[: len(rows) * width].view(len(rows), width)
    lens, starts, slots = buffer[: len(rows)], buffer[1 : len(rows) + 2], buffer[1 : sum(rows) + 1]

    def states(heads, dim):
        shape = (heads, sum(rows)) if heads_first else (sum(rows), heads)
        made = torch.empty(*shape, dim, dtype=layer.dtype)
        return made.transpose(0, 1) if heads_first else made

    query, key, value = (
        states(heads, dim) for heads, dim in zip([layer.num_heads, *[layer.num_kv_heads] * 2], (dims[0], *dims))
    )
    options = {"window": layer.window, **dict(zip(("key_scales", "value_scales"), scales))}
    if layer.has_softcap:
        options["softcap"] = 20.0
    if layer.sinks is not None:
        options["sinks"] = torch.empty(layer.num_heads, dtype=layer.sinks)
    out = query.new_empty(*query.shape[:2], layer.value_dim)
    blocks = slots[: len(slots) // 2 + 1]
    return [
        write_call(key, value, *caches, slots, *scales),
        *(copy_call(*pages, blocks, blocks) for pages in (caches, scales) if pages),
        *attention_calls(target.device, out, query, *caches, tables, lens, starts, 0.1, **options),
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_steps_ask_for_no_kernel_that_is_not_compiled_ahead(layer):
    """Any number of rows, queries and blocks, and inputs at any address: the kernels are these few."""
    target, chance = TARGETS["sm90"], random.Random(layer)
    ahead = compile.specialisations(layer_calls(target.device, LAYERS[layer]), target)
    asked = set()
    for _ in range(60):
        num_rows = chance.choice([1, 2, 7, 16, 33, 64])
        rows = [chance.choice([1, 1, chance.choice([2, 16, 40])]) for _ in range(num_rows)]
        if chance.random() < 0.5:
            rows = [1] * num_rows
        width = chance.choice([1, 5, 16, 300])
        asked |= compile.specialisations(
            step_calls(target, LAYERS[layer], rows, width, chance.random() < 0.5, chance.randrange(3)), target
        )
    assert asked == ahead
    assert len(ahead) == {"llama": 11, "window": 11, "short_window": 5, "large_group": 5, "int8": 12, "fp8": 12}[layer]


def test_steps_of_latents_ask_for_no_kernel_that_is_not_compiled_ahead():
    target, chance = TARGETS["sm90"], random.Random(0)
    layer = AttentionLayer(16, 1, 512, 64, 16, torch.bfloat16, expanded_dim=192)
    ahead = compile.specialisations(layer_calls(target.device, layer), target)
    asked = set()
    for number in range(60):
        num_rows, width = chance.choice([1, 2, 7, 33]), chance.choice([1, 5, 300])
        rows = [chance.choice([1, 1, 2, 40]) for _ in range(num_rows)] if number % 2 else [1] * num_rows
        caches = [torch.empty(2, 1, 16, dim, dtype=layer.dtype) for dim in (512, 64)]
        numbers = torch.zeros(sum(rows) + num_rows * width + 4, dtype=torch.long)[chance.randrange(3) :]
        # As products with the weights leave them: head by head, the rope part inside the model's own queries.
        query_latent = torch.empty(16, sum(rows), 512, dtype=layer.dtype).transpose(0, 1)
        query_rope = torch.empty(sum(rows), 16, 192, dtype=layer.dtype)[..., 128:]
        slots, states = numbers[: sum(rows)], [torch.empty(sum(rows), 1, dim, dtype=layer.dtype) for dim in (512, 64)]
        tables = numbers[: num_rows * width].view(num_rows, width)
        rows_of_step = (tables, numbers[:num_rows], numbers[: num_rows + 1], 0.1)
        calls = latent_calls(
            target.device, torch.empty_like(query_latent), query_latent, query_rope, *caches, *rows_of_step
        )
        moved = [write_call(*states, *caches, slots), copy_call(*caches, slots[:1], slots[:1])]
        asked |= compile.specialisations([*moved, *calls], target)
    assert asked == ahead and len(ahead) == 11


def test_kernels_are_compiled_ahead_by_several_processes():
    """Into the cache on disk, where a process that launches finds them; what does not compile is named."""
    layer = LAYERS["large_group"]
    compiled, failures = compile_layers([layer, layer], TARGETS["sm90"].device, num_processes=2)
    assert (compiled, failures) == (5, [])
    cached = set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    assert {path.stem for path in cached} >= {"copy_kernel", "write_kernel", "prefill_kernel", "reduce_kernel"}
    for call in layer_calls(TARGETS["sm90"].device, layer):
        compile.compile_call(call, TARGETS["sm90"])
    assert set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")) == cached


@pytest.mark.parametrize("arch", ["sm75", "gfx803", "tpu"])
def test_nothing_is_compiled_for_what_the_kernels_do_not_serve(arch):
    with pytest.raises(ValueError, match=f"no kernels for {arch}"):
        gpu_target(Device(arch, 100))


@pytest.mark.parametrize("number", range(len(THRESHOLDS)))
def test_every_threshold_can_be_missed(number):
    threshold = THRESHOLDS[number]
    codes = "int8" if threshold.is_quantized else None
    case = Case(threshold.kernels[0], threshold.dtypes[0], is_full=bool(threshold.is_full), codes=codes)
    target = TARGETS[threshold.archs[0]]
    bound = threshold.at_least if threshold.at_most is None else threshold.at_most
    worse = bound - 0.1 if threshold.at_most is None else bound + 0.1
    assert not judge(case, target, {threshold.figure: 10**3 if threshold.at_most is None else 0})
    assert judge(case, target, {threshold.figure: worse})


def test_loops_are_found():
    """A loop in a loop; a wait that spins behind the end belongs to its loop, a jump backwards alone is none."""
    text = """start
        outer: a
        inner: b
        goto_if late
        back: c
        goto_if inner
        d
        goto_if outer
        end
        late: e
        goto back"""
    lines = [part for line in text.split("\n") for part in re.findall(r"\w+:|goto\w* \w+|\w+", line)]

    def jump(line):
        if line == "end":
            return loops.Jump(None, False)
        return loops.Jump(line.split()[1], line.startswith("goto_if")) if line.startswith("goto") else None

    inner, outer = loops.natural_loops(lines, re.compile(r"(\w+):"), jump)
    assert inner == ["b", "goto_if late", "c", "goto_if inner", "e", "goto back"]
    assert set(outer) - set(inner) == {"a", "d", "goto_if outer"}


def test_the_command(monkeypatch, tmp_path, capsys):
    quick = [(Case("copy"), TARGETS["sm80"]), (Case("write"), TARGETS["gfx942"])]
    monkeypatch.setattr("hf_paged_evals.triton.cases.few_cases", lambda: quick)
    arguments = ["eval", "triton", "--quick", "--jobs", "1", "--out", str(tmp_path / "out.json")]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "All 2 kernels pass" in out and "Estimates, not measurements" in out and "SGLang" in out
    (section,) = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert len(section["tables"][0]["rows"]) == 2
    monkeypatch.setattr("hf_paged_evals.triton.measure.THRESHOLDS", [dataclasses.replace(THRESHOLDS[0], at_most=-1)])
    assert command.main(arguments[2:-2]) == 1
    assert "MISSED: spilled 0, must be <= -1" in capsys.readouterr().out
