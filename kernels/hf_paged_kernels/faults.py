"""Faults of a device: errors that no model, no caller and no kernel choice can do anything about.

After most of them every later call on the device fails, too, until the process ends. So they are neither tried again
nor taken for a reason to compute in another way: they reach the caller as they are.
"""

import torch

# Raised for what a driver reports. Not every torch has it.
_ACCELERATOR_ERROR: type[Exception] | None = getattr(torch, "AcceleratorError", None)
# How messages of plain `RuntimeError`s begin: torch's of a runtime, a driver or a library, Triton's of a driver.
_BEGINNINGS = ("CUDA error:", "CUDA driver error:", "HIP error:", "cuDNN error:", "MIOpen error:", "Triton Error [")


def is_device_fault(error: BaseException) -> bool:
    """Tell whether a device or its driver has failed: an illegal access, a failed launch, a kernel for another GPU.

    An error that was raised from one is one as well. Memory that torch's allocator finds none of is no fault: see
    `is_out_of_memory`.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _ACCELERATOR_ERROR is not None and isinstance(cause, _ACCELERATOR_ERROR):
            return True
        if isinstance(cause, RuntimeError) and str(cause).startswith(_BEGINNINGS):
            return True
        cause = cause.__cause__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error may go away by itself: there was no memory, and later there may be."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)
