"""A library that compiles in a moment, one that tells when it is loaded, and scripts in a compiler's place."""

import ctypes
import shlex
import subprocess
from pathlib import Path

from hf_paged_kernels.cpu import build
from hf_paged_kernels.cpu.compiler import find_compiler


def build_one(folder: Path, number: int = 1) -> Path:
    """Build, by way of the cache, a library whose function `one` returns `number`."""
    source = folder / f"{number}.cpp"
    source.write_text(f'extern "C" __attribute__((visibility("default"))) int one() {{ return {number}; }}\n')
    return build.build_library(find_compiler(), "one", [(source, [])])


def plant(folder: Path) -> tuple[Path, Path]:
    """A library whose constructor writes a file, and that file's path."""
    marker, source, library = folder / "marker", folder / "planted.cpp", folder / "planted.so"
    source.write_text(
        "#include <cstdio>\n"
        f'__attribute__((constructor)) static void run() {{ std::fclose(std::fopen("{marker}", "w")); }}\n'
    )
    subprocess.run([*find_compiler().command, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    ctypes.CDLL(str(library))
    assert marker.exists(), "what is planted does nothing"
    marker.unlink()
    return library, marker


def script(folder: Path, name: str, *lines: str) -> str:
    """A program in sh, as a command that can be CXX."""
    path = folder / name
    path.write_bytes("\n".join(["#!/bin/sh", *lines, ""]).encode(errors="surrogateescape"))
    path.chmod(0o755)
    return shlex.quote(str(path))
