"""What this machine offers: processor, C++ compiler, GPUs."""

import os
import shlex
import subprocess
from dataclasses import dataclass

import torch

_COMPILERS = ("c++", "g++", "clang++")
_FEATURES = {
    "avx2": "AVX2",
    "avx512_f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_tile": "AMX",
    "neon": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answers ``--version``.

    Attributes
    ----------
    command : list of str
        What runs it, arguments of ``$CXX`` included.
    version : str
        The first line of its answer.
    """

    command: list[str]
    version: str


def vector_units() -> dict[str, bool]:
    """The vector instructions that matter to attention on this kind of processor, and whether it has them."""
    found = torch.cpu.get_capabilities()
    return {title: bool(found[name]) for name, title in _FEATURES.items() if name in found}


def find_compiler() -> Compiler | None:
    """The first of ``$CXX``, c++, g++ and clang++ that runs. ``$CXX`` alone, where it is set."""
    try:
        stated = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # A quotation mark that is never closed.
        return None
    for command in [stated] if stated else [[name] for name in _COMPILERS]:
        try:
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return Compiler(command, done.stdout.strip().splitlines()[0])
    return None


def gpus() -> list[str]:
    """A line for each GPU that torch can use: name, capability, memory."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        lines.append(f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.1f} GiB")
    return lines


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, or None if there is none that answers."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None
