"""Times on the device, and of the host that feeds it."""

import time
from collections.abc import Callable
from statistics import median

import torch

from hf_paged_evals.gpu.context import Context

_MOST, _FEWEST = 200, 5  # Runs of one timing.


def device_us(context: Context, run: Callable[[], object], budget_ms: float = 100) -> float:
    """Median microseconds that a run takes on the device.

    Two runs before the first timed one compile and warm up. In a dry run the host's clock serves.

    Parameters
    ----------
    budget_ms : float
        As many runs are timed as fit in here.
    """
    run()
    run()
    context.synchronize()
    if context.device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6
    first = _elapsed_ms(run, 1)[0]
    count = int(min(_MOST, max(_FEWEST, budget_ms / max(first, 1e-3))))
    return median(_elapsed_ms(run, count)) * 1e3


def _elapsed_ms(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of some runs in a row, by events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def captured(context: Context, run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `run`, whose tensors must stay alive; in a dry run `run` itself."""
    if context.device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Nothing may be compiled or allocated for the first time while it is captured.
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_us(context: Context, run: Callable[[], object], count: int = 100) -> float:
    """Microseconds that the host takes to issue a run, on average, without waiting for the device."""
    run()
    context.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        run()
    issued = time.perf_counter() - began
    context.synchronize()
    return issued / count * 1e6


def copy_bandwidth(context: Context) -> float:
    """Bytes a second that a copy on the device reads and writes, together."""
    count = 1 << 14 if context.is_dry else 1 << 29  # 1 GiB of bfloat16: far more than any cache holds.
    source = torch.zeros(count, dtype=torch.bfloat16, device=context.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_us(context, lambda: target.copy_(source)) * 1e6


def seconds_of(context: Context, run: Callable[[], object]) -> float:
    """Wall-clock seconds of a run, until the device is done with it."""
    context.synchronize()
    began = time.perf_counter()
    run()
    context.synchronize()
    return time.perf_counter() - began
