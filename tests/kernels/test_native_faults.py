"""Without the C++ kernels, for any reason, generate runs in torch after one warning, and never raises."""

import os
import pwd
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import hf_paged
from hf_paged.cli import main
from hf_paged_kernels import ops
from hf_paged_kernels.cpu import compiler, loader
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler
from support import zoo
from support.small_library import script


def no_home(folder, patch):
    for name in ("HOME", "HF_PAGED_CACHE", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", lambda user: {}["no entry"])


def hanging(folder, patch):
    patch.setattr(compiler, "_COMPILE_SECONDS", 0.3)
    patch.setenv("CXX", script(folder, "hangs", '[ "$1" = --version ] && exit 0', "sleep 60"))


def deleted_working_folder(folder, patch):
    (folder / "gone").mkdir()
    patch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    patch.setenv("HF_PAGED_CACHE", "cache")


def shared(folder, patch):
    (folder / "shared").mkdir()
    (folder / "shared").chmod(0o777)
    patch.setenv("HF_PAGED_CACHE", str(folder / "shared"))


def setting(name, value):
    return lambda folder, patch: patch.setenv(name, value)


FAULTS = {
    "no HOME and no passwd entry": (no_home, "there is no folder for compiled kernels"),
    "a folder that was deleted": (deleted_working_folder, "there is no folder for compiled kernels"),
    "a cache that is a file": (lambda folder, patch: (folder / "cache").write_text(""), "cache is not what"),
    "a cache inside a file": (setting("HF_PAGED_CACHE", "/dev/null/cache"), "cannot be read"),
    "a read-only file system": (setting("HF_PAGED_CACHE", "/proc/hf_paged"), "cannot be written"),
    "a path too long": (setting("HF_PAGED_CACHE", "/tmp/" + 5000 * "x"), "cannot be read"),
    "a cache that others may write": (shared, "is not trusted"),
    "no such compiler": (setting("CXX", "no-such-compiler"), "is no C++ compiler that runs here"),
    "a compiler that hangs": (hanging, "did not end within"),
    "a compiler that says it in latin-1": (
        lambda folder, patch: patch.setenv("CXX", script(folder, "c++", "echo \udce4 >&2; exit 1")),
        "is no C++ compiler that runs here",
    ),
    "no compiler": (setting("PATH", ""), "no C++ compiler was found"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return zoo.pair("llama")


@pytest.fixture
def without_kernels(monkeypatch, tmp_path):
    """The kernels as in a process that has not used them, and the ops as before they were registered."""
    for name in ("_library", "_path", "_failure"):
        monkeypatch.setattr(loader, name, None)
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))
    calls = []
    for name in ("write_and_attend", "write_kv", "paged_attention", "copy_blocks"):
        in_torch = getattr(torch.ops.hf_paged, f"{name}_torch").default

        def call(*arguments, in_torch=in_torch):
            calls.append(loader.load())
            return in_torch(*arguments)

        monkeypatch.setattr(ops, name, call)
    return calls


@pytest.mark.parametrize("fault", FAULTS)
def test_generate_goes_on_in_torch(fault, models, without_kernels, tmp_path, monkeypatch):
    dense, paged = models
    make_fault, words = FAULTS[fault]
    inputs = zoo.prompts([9, 4])
    expected = dense.generate(**inputs, max_new_tokens=6)
    reads = hf_paged.stats(paged).page_reads
    make_fault(tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(paged.generate(**inputs, max_new_tokens=6), expected)
    ours = [str(warning.message) for warning in said if "hf_paged" in str(warning.message)]
    assert len(ours) == 1 and words in ours[0] and "set" in ours[0].lower()
    assert without_kernels and not any(without_kernels), "the kernels served the call"
    assert hf_paged.stats(paged).page_reads > reads
    assert not loader.state().available and words in loader.state().reason


@pytest.mark.slow
def test_the_command_compiles_what_is_damaged_anew(tmp_path, monkeypatch, capsys):
    cache = shutil.copytree(loader.state().path.parent, tmp_path / "cache")
    path = cache / loader.state().path.name
    content = path.read_bytes()
    cache.chmod(0o700)
    path.write_bytes(content[:1000])
    monkeypatch.setenv("HF_PAGED_CACHE", str(cache))
    assert main.main(["build"]) == 0 and capsys.readouterr().out == f"compiled: {path}\n"
    assert len(path.read_bytes()) == len(content)


@pytest.mark.slow
def test_the_command_prints_any_path(tmp_path, monkeypatch):
    """A name that no encoding has, on a terminal that speaks ASCII."""
    environment = {**os.environ, "HF_PAGED_CACHE": os.fsdecode(bytes(tmp_path) + b"/\xff"), "PYTHONIOENCODING": "ascii"}
    shutil.copytree(loader.state().path.parent, environment["HF_PAGED_CACHE"])
    os.chmod(environment["HF_PAGED_CACHE"], 0o700)
    command = [sys.executable, "-m", "hf_paged.cli", "build"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("compiled: ") and "\\udcff" in done.stdout


def test_a_library_without_kernels(tmp_path, monkeypatch, without_kernels):
    real = find_compiler().command[0]
    (source := tmp_path / "empty.cpp").write_text("")
    link = f'case "$*" in *-shared*) for last; do :; done; exec {real} -shared -o "$last" {source};; esac'
    monkeypatch.setenv("CXX", script(tmp_path, "c++", '[ "$1" = --version ] && exit 0', link))
    with pytest.warns(UserWarning, match="holds no kernels"):
        assert loader.load() is False


def test_an_exception_of_a_signal_handler_is_not_ours_to_keep(monkeypatch, without_kernels):
    """A `TimeoutError` is an `OSError`, as those of a cache that cannot be written."""

    def interrupted(*arguments):
        raise TimeoutError("the program's own alarm")

    monkeypatch.setattr(loader, "build_kernels", interrupted)
    with pytest.raises(TimeoutError, match="alarm"):
        loader.load()
    assert loader._failure is None


def test_a_fork_during_a_build_has_a_lock_of_its_own(without_kernels, monkeypatch):
    monkeypatch.setenv("HF_PAGED_NATIVE", "1")
    monkeypatch.setattr(loader, "build_kernels", lambda compiler: (_ for _ in ()).throw(BuildError("tried")))
    with loader._lock:
        child = os.fork()
        if not child:
            import faulthandler

            faulthandler.dump_traceback_later(20, exit=True)
            warnings.simplefilter("ignore")
            os._exit(7 if loader.load() is False else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
