"""The processor and the GPUs of this machine."""

import subprocess

import torch

_FEATURES = {
    "avx2": "AVX2",
    "avx512_f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_tile": "AMX",
    "neon": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}


def vector_units() -> dict[str, bool]:
    """Return the vector instructions that attention profits from on this kind of processor; True if it has them."""
    found = torch.cpu.get_capabilities()
    return {title: bool(found[name]) for name, title in _FEATURES.items() if name in found}


def gpus() -> list[str]:
    """Return a line for each GPU that torch can use: name, capability, memory."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        lines.append(f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.1f} GiB")
    return lines


def gpu_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None if there is none that answers."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None
