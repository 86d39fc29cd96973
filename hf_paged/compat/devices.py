"""Devices, by the module that torch has for each type of them: `torch.cuda`, `torch.xpu` and so on.

These modules offer much the same, and none of it is promised of all: what is used here is found by name.
"""

from types import ModuleType

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
