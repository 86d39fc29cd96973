"""Compiling the kernels: once, by the process that comes first, and never missed without a compiler."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hf_paged.cli import main
from hf_paged_kernels import ops, torch_sdpa
from hf_paged_kernels.cpu import build, loader
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler
from support.op_matrix import make_pages

USE = """
import torch
from hf_paged_kernels import ops
from hf_paged_kernels.cpu import loader
caches = [torch.ones(2, 1, 4, 8) for _ in range(2)]
ops.copy_blocks(*caches, torch.tensor([0]), torch.tensor([1]))
state = loader.state()
print(state.available, state.isa, state.path)
"""


@pytest.fixture
def counted_compiler(tmp_path, monkeypatch):
    """A compiler that makes a small library at once and writes down how often it linked one."""
    source, calls = tmp_path / "one.cpp", tmp_path / "calls"
    source.write_text('extern "C" int one() { return 1; }\n')
    real = find_compiler().command[0]
    script = tmp_path / "counted-c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo link >> {calls};; esac\nexec {real} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))
    return find_compiler(), [(source, [])], lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def run(code: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)


def broken_compiler(folder: Path) -> str:
    script = folder / "broken-c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "one.cpp:1: error: this compiler is broken" >&2\nexit 1\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_a_library_is_compiled_once(counted_compiler):
    compiler, objects, links = counted_compiler
    first = build.build_library(compiler, "one", objects)
    assert build.build_library(compiler, "one", objects) == first and first.exists() and links() == 1
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".lock", ".sha256", ".so"]  # No scratch is left.


def test_a_changed_source_or_flag_is_compiled_anew(counted_compiler):
    compiler, objects, links = counted_compiler
    first = build.build_library(compiler, "one", objects)
    assert build.build_library(compiler, "one", [(objects[0][0], ["-DX"])]) != first
    objects[0][0].write_text('extern "C" int one() { return 2; }\n')
    assert build.build_library(compiler, "one", objects) != first and links() == 3


@pytest.mark.slow
def test_processes_that_start_together_compile_once(counted_compiler):
    compiler, objects, links = counted_compiler
    code = (
        "from pathlib import Path; from hf_paged_kernels.cpu import build, compiler; "
        f"print(build.build_library(compiler.find_compiler(), 'one', [(Path({str(objects[0][0])!r}), [])]))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(paths) == 1 and Path(paths.pop()).exists() and links() == 1


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """The kernels as in a process that has not used them, with an empty cache; the C++ ops stay registered."""
    monkeypatch.setattr(loader, "_library", None)
    monkeypatch.setattr(loader, "_path", None)
    monkeypatch.setattr(loader, "_failure", None)
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))


def test_a_broken_compiler_warns_once_and_torch_computes(tmp_path):
    code = USE + "ops.copy_blocks(*caches, torch.tensor([1]), torch.tensor([0]))\nprint(state.reason)\n"
    done = run(code, CXX=broken_compiler(tmp_path), HF_PAGED_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("False None") and "this compiler is broken" in done.stdout
    assert done.stderr.count("native CPU kernels are not available") == 1
    assert "this compiler is broken" in done.stderr and "hf-paged build" in done.stderr


def test_no_compiler_at_all(unloaded, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "install g++" in loader.state().reason
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found"):
        assert loader.load() is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.load() is False
    assert not loader.state().available


def test_a_compiler_that_is_not_there(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler is no C++ compiler that runs here" in loader.state().reason


def test_a_cache_that_cannot_be_written(unloaded, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set HF_PAGED_CACHE"):
        build.build_kernels(find_compiler())


def test_not_compiled_yet_is_no_failure(unloaded):
    state = loader.state()
    assert not state.available and "hf-paged build" in state.reason and state.compiler


def test_native_kernels_can_be_turned_off():
    done = run(USE, HF_PAGED_NATIVE="0")
    assert done.stdout.startswith("False None") and not done.stderr.count("Warning: hf_paged")


@pytest.mark.slow
def test_an_instruction_set_can_be_forced():
    assert run(USE, HF_PAGED_CPU_ISA="baseline").stdout.split()[:2] == ["True", "baseline"]


@pytest.mark.slow
def test_an_unknown_instruction_set_is_named():
    done = run(USE, HF_PAGED_CPU_ISA="mmx")
    assert done.stdout.startswith("True") and "HF_PAGED_CPU_ISA=mmx is not one of" in done.stderr
    with pytest.raises(ValueError, match="no kernels for 'mmx'"):
        loader.use_isa("mmx")


def test_the_command_builds(capsys):
    assert main.main(["build"]) == 0
    assert str(loader.state().path) in capsys.readouterr().out


def test_the_command_says_why_it_cannot(unloaded, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", broken_compiler(tmp_path))
    assert main.main(["build"]) == 1
    assert "this compiler is broken" in capsys.readouterr().err


def test_torch_and_the_kernels_agree():
    arguments, _ = make_pages([(40, 1), (21, 3)], (4, 2), 16, torch.float32)
    torch.testing.assert_close(ops.paged_attention(*arguments, 0.3), torch_sdpa.paged_attention(*arguments, 0.3))
