"""Devices, by the module that torch has for each type of them: `torch.cuda`, `torch.xpu` and so on.

These modules offer much the same, and none of it is promised of all: what is used here is found by name.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch


def module_of(device: torch.device) -> ModuleType | None:
    """torch's module for a type of device; None if there is none, as for "meta"."""
    try:
        return torch.get_device_module(device)
    except RuntimeError:
        return None


def own_memory(device: torch.device) -> tuple[int, int] | None:
    """The memory of a device that has memory of its own.

    Returns
    -------
    (free, total) or None
        Bytes that allocations through torch could get now, and bytes that they can get at most. What torch's caching
        allocator holds and does not use is free. None for a device that shares the host's memory.
    """
    module = module_of(device)
    if module is None or not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    allocated = module.memory_allocated(device)
    free += module.memory_reserved(device) - allocated
    if hasattr(module, "get_per_process_memory_fraction"):
        total = int(total * module.get_per_process_memory_fraction(device))
    return max(0, min(free, total - allocated)), total


def streams(device: torch.device) -> tuple[Any, Any] | None:
    """The stream that this thread has chosen on a device, and the device's default stream.

    None where all work has one order: on the CPU, and on devices without a default stream.
    """
    module = None if device.type == "cpu" else module_of(device)
    if module is None or not hasattr(module, "default_stream"):
        return None
    return module.current_stream(device), module.default_stream(device)


@contextlib.contextmanager
def entered(stream: Any, device: torch.device) -> Iterator[None]:
    """Queue this thread's work for `device` on a stream. Which device is the current one stays."""
    module: Any = module_of(device)
    current = module.current_device()
    with module.stream(stream), module.device(current):  # The first makes the stream's device the current one.
        yield


def upload(numbers: Sequence[Sequence[int]] | Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers as an int64 tensor on a device. The host does not wait for what the device has to do before."""
    tensor = torch.tensor(numbers)
    # Pinned memory is given to no other tensor before the copy is over.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def host_memory(shape: Sequence[int]) -> torch.Tensor:
    """Bytes of the host's that a device copies to and from while the host goes on: pinned, if the system pins them."""
    try:
        return torch.empty(*shape, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(*shape, dtype=torch.uint8)


def keep_for(tensor: torch.Tensor, stream: Any) -> None:
    """Have the memory of a tensor given to no other one before what is queued on `stream` by then has run."""
    tensor.record_stream(stream)
