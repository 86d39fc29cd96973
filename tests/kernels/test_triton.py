"""The Triton kernels without a GPU: their machine code for several, and that the checks of it can fail."""

import dataclasses
import json
import re

import pytest

from hf_paged.cli import main
from hf_paged_evals.triton import command, compile, disassembly, loops
from hf_paged_evals.triton.cases import Case, few_cases
from hf_paged_evals.triton.measure import judge, measure
from hf_paged_evals.triton.targets import TARGETS
from hf_paged_evals.triton.thresholds import THRESHOLDS


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


@pytest.mark.parametrize("number", range(len(THRESHOLDS)))
def test_every_threshold_can_be_missed(number):
    threshold = THRESHOLDS[number]
    case = Case(threshold.kernels[0], threshold.dtypes[0], is_full=bool(threshold.is_full))
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
