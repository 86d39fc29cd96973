"""What the benchmarks share: contenders timed in turns, and the floor of memory's bandwidth."""

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_paged_kernels.cpu import build, loader
from hf_paged_kernels.cpu.compiler import find_compiler


def machine() -> str:
    """The processor, its threads in use and the kernels' instruction set."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    state = loader.state()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, kernels: {state.isa or state.reason}"


def take_turns(contenders: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call. Every turn runs each contender once, so that all see the same noise.

    A contender gets a number that grows by one from call to call, whoever is called: what it takes from a
    rotating set with it has left the cache.
    """
    seconds = {name: [] for name in contenders}
    calls = 0
    for turn in range(repeats + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(calls)
            elapsed = time.perf_counter() - start
            calls += 1
            if turn >= 2:  # The first turns warm up.
                seconds[name].append(elapsed)
    return seconds


median = statistics.median


def load_stream_read() -> Callable[[torch.Tensor], int]:
    """An op that reads a tensor once, as fast as torch's threads can."""
    source = Path(__file__).with_name("stream_read.cpp")
    path = build.build_library(find_compiler(), "stream_read", [(source, ["-O3", "-march=native"])])
    torch.ops.load_library(str(path))
    return torch.ops.hf_paged_evals.stream_read.default
