"""Compile the C++ kernels with the system's compiler, once, into the user's cache."""

import contextlib
import hashlib
import os
import platform
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hf_paged_kernels.cpu.compiler import BuildError, Compiler, run_compiler
from hf_paged_kernels.cpu.store import cache_folder, has_library, keep_library, lock_library

SOURCES = Path(__file__).parent / "src"
_TORCH = Path(torch.__file__).parent
_FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -w".split()
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
# Flags of each instruction set that the work files are compiled for; the processor's best is chosen at run time.
_X86_ISAS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
}
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def library_path(compiler: Compiler) -> Path:
    """The place in the cache of the kernels that `compiler` makes from these sources for this torch."""
    return _cached(compiler, "cpu", _kernel_objects())


def build_kernels(compiler: Compiler) -> Path:
    """Compile the kernels unless they are in the cache, whole; returns the path of the shared library.

    Safe when several processes start at once: one compiles, the others wait and find the result.

    Raises
    ------
    BuildError
        If the compiler fails, or the cache cannot be written or trusted.
    """
    return build_library(compiler, "cpu", _kernel_objects())


def build_library(compiler: Compiler, name: str, objects: list[tuple[Path, list[str]]]) -> Path:
    """As `build_kernels`, for any list of (source file, flags), linked against torch."""
    path = _cached(compiler, name, objects)
    if not has_library(path):
        with lock_library(path):
            if not has_library(path):
                with _scratch_folder() as scratch:
                    compiling = _torch_flags(_TORCH / "include", torch.__version__)
                    keep_library(_compile(compiler, objects, compiling, scratch), path)
    return path


def _kernel_objects() -> list[tuple[Path, list[str]]]:
    isas = _X86_ISAS if _IS_X86 else {"baseline": []}
    # The slowest first: the objects are compiled side by side.
    work = [
        (SOURCES / name, [*flags, f"-DHF_PAGED_ISA={isa}"])
        for isa, flags in reversed(isas.items())
        for name in ("work.cpp", "code_work.cpp", "latent_work.cpp")
    ]
    rest: list[tuple[Path, list[str]]] = [(SOURCES / name, []) for name in ("binding.cpp", "plan.cpp", "copy.cpp")]
    has_isas = ["-DHF_PAGED_X86"] if _IS_X86 else []
    return [*work, *rest, *((SOURCES / name, has_isas) for name in ("isa.cpp", "latent.cpp"))]


def _torch_flags(include: Path, version: str) -> list[str]:
    """Flags to compile against the headers of a torch."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return [f"-I{include}", f"-I{SOURCES}", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]


def _cached(compiler: Compiler, name: str, objects: list[tuple[Path, list[str]]]) -> Path:
    key = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *_FLAGS, *compiler.command, compiler.version):
        key.update(os.fsencode(part) + b"\0")
    headers: list[tuple[Path, list[str]]] = [(path, []) for path in sorted(SOURCES.glob("*.h"))]
    try:
        for path, flags in [*objects, *headers]:
            key.update(" ".join([path.name, *flags]).encode() + b"\0" + path.read_bytes())
    except OSError as error:
        raise BuildError(f"the kernels' sources cannot be read ({error}): install hf_paged anew") from error
    return cache_folder() / f"{name}-{key.hexdigest()[:16]}.so"


@contextlib.contextmanager
def _scratch_folder():
    """A folder of this user alone. Not inside the cache: other users may be able to write the folders above that."""
    try:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError as error:
        raise BuildError(f"no folder can be compiled in ({error}): set TMPDIR to one that can be written") from error
    with folder as name:
        yield Path(name)


def _compile(compiler: Compiler, objects: list[tuple[Path, list[str]]], compiling: list[str], scratch: Path) -> Path:
    """Compile objects, each with flags for all and its own, and link them against the installed torch."""
    has_failed = threading.Event()

    def compile_one(job):
        index, (source, flags) = job
        target = scratch / f"{index}.o"
        if not has_failed.is_set():  # Else the error is raised below, and no other object is of use.
            try:
                run_compiler(compiler, [*_FLAGS, *compiling, *flags, "-c", str(source), "-o", str(target)])
            except BuildError:
                has_failed.set()
                raise
        return target

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        targets = list(threads.map(compile_one, enumerate(objects)))
    library = scratch / "library.so"
    run_compiler(compiler, [*map(str, targets), "-shared", f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library)])
    if not library.is_file() or not library.stat().st_size:
        raise BuildError(f"{compiler.command[0]!r} reports no error and makes no library: set CXX to a C++ compiler")
    return library
