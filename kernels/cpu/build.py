"""Compile the C++ kernels with the system's compiler, once, into the user's cache."""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
_FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -w".split()
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
# Flags of each instruction set that work.cpp is compiled for; the processor's best is chosen at run time.
_X86_ISAS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
}
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ERROR_LINES = 5


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


def find_compiler() -> list[str]:
    """The C++ compiler as a command: ``$CXX``, else ``c++``, ``g++`` or ``clang++``.

    Raises
    ------
    BuildError
        If there is none.
    """
    if os.environ.get("CXX"):
        try:
            command = shlex.split(os.environ["CXX"])
        except ValueError as error:
            raise BuildError(f"CXX={os.environ['CXX']} is no command ({error}): set it to a C++ compiler") from error
        if shutil.which(command[0]) is None:
            raise BuildError(
                f"there is no C++ compiler {command[0]!r}, which CXX names: set CXX to one that is installed"
            )
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX to one")


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$HF_PAGED_CACHE``, else hf_paged in the user's cache folder."""
    if os.environ.get("HF_PAGED_CACHE"):
        return Path(os.environ["HF_PAGED_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_paged"


def library_path(compiler: list[str]) -> Path:
    """Where the kernels that `compiler` makes from these sources for this torch are kept."""
    return _cached(compiler, "cpu", _kernel_objects())


def build_kernels(compiler: list[str]) -> Path:
    """Compile the kernels unless they are in the cache; returns the path of the shared library.

    Safe when several processes start at once: one compiles, the others wait and find the result.

    Raises
    ------
    BuildError
        If the compiler fails or the cache cannot be written.
    """
    return build_library(compiler, "cpu", _kernel_objects())


def build_library(compiler: list[str], name: str, objects: list[tuple[Path, list[str]]]) -> Path:
    """As `build_kernels`, for any list of (source file, flags), linked against torch."""
    path = _cached(compiler, name, objects)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            if not path.exists():
                # Renamed when it is whole: a process that does not know of the lock never sees half of it.
                os.replace(_compile(compiler, objects, Path(scratch)), path)
    except OSError as error:
        raise BuildError(
            f"{path.parent} cannot be written ({error}): set HF_PAGED_CACHE to a folder that can"
        ) from error
    return path


def _kernel_objects() -> list[tuple[Path, list[str]]]:
    isas = _X86_ISAS if _IS_X86 else {"baseline": []}
    # The slowest first: the objects are compiled side by side.
    work = [(SOURCES / "work.cpp", [*flags, f"-DHF_PAGED_ISA={name}"]) for name, flags in reversed(isas.items())]
    rest = [(SOURCES / name, []) for name in ("binding.cpp", "plan.cpp", "copy.cpp")]
    return [*work, *rest, (SOURCES / "isa.cpp", ["-DHF_PAGED_X86"] if _IS_X86 else [])]


def _torch_flags() -> tuple[list[str], list[str]]:
    """Flags to compile and to link against the installed torch."""
    root = Path(torch.__file__).parent
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    compiling = [
        f"-I{root / 'include'}",
        f"-I{SOURCES}",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
    ]
    return compiling, ["-shared", f"-L{root / 'lib'}", "-ltorch_cpu"]


def _cached(compiler: list[str], name: str, objects: list[tuple[Path, list[str]]]) -> Path:
    key = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *_FLAGS, *compiler, _version(compiler)):
        key.update(part.encode() + b"\0")
    headers = [(path, []) for path in sorted(SOURCES.glob("*.h"))]
    for path, flags in [*objects, *headers]:
        key.update(" ".join([path.name, *flags]).encode() + b"\0" + path.read_bytes())
    return cache_folder() / f"{name}-{key.hexdigest()[:16]}.so"


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"]).stdout


def _compile(compiler: list[str], objects: list[tuple[Path, list[str]]], scratch: Path) -> Path:
    compiling, linking = _torch_flags()

    def compile_one(job):
        index, (source, flags) = job
        target = scratch / f"{index}.o"
        _run([*compiler, *_FLAGS, *compiling, *flags, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        targets = list(threads.map(compile_one, enumerate(objects)))
    library = scratch / "library.so"
    _run([*compiler, *map(str, targets), *linking, "-o", str(library)])
    return library


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]!r} cannot be run ({error}): set CXX to another") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[:_ERROR_LINES]
        raise BuildError(
            "\n  ".join([f"the C++ compiler {command[0]!r} failed (exit code {done.returncode}):", *said])
            + "\n  Set CXX to a compiler of C++17, such as g++ 9 or clang++ 10"
        )
    return done


@contextlib.contextmanager
def _lock(path: Path):
    """Hold a file lock where the system has them."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file, contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
