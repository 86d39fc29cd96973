"""The compiler that is used, and how it fails: always with a sentence, and never for ever."""

import time

import psutil
import pytest

from hf_paged_kernels.cpu import compiler
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler
from support.small_library import build_one, script

VERSION = '[ "$1" = --version ] && exit 0'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is all of PATH; no compiler is named, and the cache is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_first_that_runs_is_found(folder):
    script(folder, "clang++", "echo clang 18")
    assert (find_compiler().command, find_compiler().version) == (["clang++"], "clang 18")
    script(folder, "c++", "exit 1")
    script(folder, "g++", "echo g++ 12")
    assert find_compiler().command == ["g++"]


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_cxx_is_none(blank, folder, monkeypatch):
    script(folder, "g++", "echo g++ 12")
    monkeypatch.setenv("CXX", blank)
    assert find_compiler().command == ["g++"]


@pytest.mark.parametrize("stated", ["none -O3", "c++ 'unclosed", "''", "/", "fails", "no-utf8-\udcff"])
def test_a_wrong_cxx_is_not_passed_over(stated, folder, monkeypatch):
    script(folder, "c++", "echo c++ 12")
    script(folder, "fails", "exit 1")
    monkeypatch.setenv("CXX", stated)
    with pytest.raises(BuildError, match="^CXX=.* is no C.. compiler that runs here: .*Set CXX to one"):
        find_compiler()


def test_arguments_of_cxx_are_kept(folder, monkeypatch):
    monkeypatch.setenv("CXX", script(folder, "my c++", "echo mine") + " -m64 '-DX=a b'")
    assert find_compiler().command == [str(folder / "my c++"), "-m64", "-DX=a b"]


def test_a_compiler_of_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", script(tmp_path, "c++ \udcff", f'exec {find_compiler().command[0]} "$@"'))
    assert build_one(tmp_path).exists()


def test_output_in_another_encoding(folder, monkeypatch):
    stated = script(folder, "c++", '[ "$1" = --version ] && echo "\udcff\udcfe 1" && exit 0', "echo \udcff >&2; exit 1")
    monkeypatch.setenv("CXX", stated)
    assert find_compiler().version == "\ufffd\ufffd 1"
    with pytest.raises(BuildError, match="failed .exit code 1.:\n  \ufffd\n  Set CXX"):
        build_one(folder)


def test_a_compiler_that_makes_nothing(folder, monkeypatch):
    monkeypatch.setenv("CXX", script(folder, "true", VERSION, "exit 0"))
    with pytest.raises(BuildError, match="reports no error and makes no library: set CXX"):
        build_one(folder)


def test_a_compiler_without_room(folder, monkeypatch):
    monkeypatch.setenv("CXX", script(folder, "c++", VERSION, "echo 1.s: No space left on device >&2; exit 1"))
    with pytest.raises(BuildError, match="Free some space, or set TMPDIR"):
        build_one(folder)


def test_no_folder_to_compile_in(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise FileNotFoundError("no usable temporary directory found")

    script(folder, "c++", VERSION)
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(BuildError, match="no usable temporary directory found.*set TMPDIR"):
        build_one(folder)


@pytest.mark.parametrize("limit, lines", [
    ("_ANSWER_SECONDS", []),
    ("_COMPILE_SECONDS", [VERSION]),
])  # fmt: skip
def test_a_compiler_that_hangs_is_ended_with_what_it_started(limit, lines, folder, monkeypatch):
    started = folder / "started"
    sleep = f"/bin/sleep 600 & echo $! > {started}"
    monkeypatch.setenv("CXX", script(folder, "c++", *lines, sleep, "wait"))
    monkeypatch.setattr(compiler, limit, 1)
    with pytest.raises(BuildError, match="did not end within 1 seconds"):
        build_one(folder)
    assert is_gone(int(started.read_text()))


def is_gone(process: int) -> bool:
    """A process that was just killed may stay for a moment, and as a zombie for ever."""
    for _ in range(100):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
