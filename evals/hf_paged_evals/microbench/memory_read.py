"""A streaming read of memory: the floor under every kernel that must read it."""

from collections.abc import Callable
from pathlib import Path

import torch

from hf_paged_kernels.cpu import build
from hf_paged_kernels.cpu.compiler import find_compiler


def load_stream_read() -> Callable[[torch.Tensor], int]:
    """An op that reads a tensor once, as fast as torch's threads can. It is compiled at first use.

    Raises
    ------
    BuildError
        If there is no C++ compiler.
    """
    source = Path(__file__).with_name("stream_read.cpp")
    path = build.build_library(find_compiler(), "stream_read", [(source, ["-O3", "-march=native"])])
    torch.ops.load_library(str(path))
    return torch.ops.hf_paged_evals.stream_read.default
