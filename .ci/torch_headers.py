"""Compile the C++ kernels against the headers of the oldest torch that pyproject.toml admits, and load them.

The stable headers decide what compiles, and the newest torch has them all. pip fetches the oldest wheel for macOS: of
those on the index it is the smallest, and the headers that the kernels include are the same on every platform.
"""

import ctypes
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from hf_paged_kernels.cpu import build
from hf_paged_kernels.cpu.compiler import find_compiler

_ROOT = Path(__file__).parents[1]
_WHEEL = "--no-deps --only-binary :all: --platform macosx_11_0_arm64 --python-version 3.11".split()
_HEADERS = "torch/include/"


def main() -> None:
    """Fetch, compile every object of every instruction set, link, load."""
    version = oldest_torch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch_headers(version, folder)
        objects = build._kernel_objects()
        flags = build._torch_flags(folder / _HEADERS, version)
        ctypes.CDLL(str(build._compile(find_compiler(), objects, flags, folder)))
    print(f"{len(objects)} objects compile against torch {version}, and torch {torch.__version__} loads them")


def oldest_torch() -> str:
    """The least version that the project's dependencies admit."""
    match = re.search(r'"torch>=([\d.]+)"', (_ROOT / "pyproject.toml").read_text())
    assert match, "pyproject.toml states no least version of torch"
    return match[1]


def fetch_headers(version: str, folder: Path) -> None:
    """Put the headers of a torch under `folder`, through pip and the index that it is configured for."""
    pip = [sys.executable, "-m", "pip", "--quiet", "download", "--dest", str(folder), *_WHEEL, f"torch=={version}"]
    subprocess.run(pip, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(_HEADERS)])


if __name__ == "__main__":
    main()
