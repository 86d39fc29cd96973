"""The backend "triton": the calls on a GPU that the Triton kernels serve. Importing this imports no Triton.

``HF_PAGED_TRITON=0``, read at first use, does without them.
"""

import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from hf_paged_kernels.backends import BackendState
from hf_paged_kernels.faults import is_device_fault
from hf_paged_kernels.quantized import LARGEST_CODE
from hf_paged_kernels.switches import is_on
from hf_paged_kernels.triton.launch_plan import MAX_DIM

_SWITCH = "HF_PAGED_TRITON"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where the key cache and the value cache stand among the arguments of each op.
_CACHES = {
    "copy_blocks": (0, 1),
    "paged_attention": (1, 2),
    "write_kv": (2, 3),
    "write_and_attend": (3, 4),
    "latent_attention": (2, 3),
}
_lock = threading.Lock()
_launch: ModuleType | None = None
_failure: str | None = None  # Why they will not run in this process; None: they do, or were not tried.


def state() -> BackendState:
    """The state of the Triton kernels in this process; loads them."""
    try:
        is_loaded = load() is not None
    except Exception as error:
        return BackendState(False, f"the device or its driver has failed: {error}")
    return BackendState(is_loaded, None if is_loaded else _failure)


def load() -> ModuleType | None:
    """The module `launch`, or None if its kernels cannot be used in this process. A failure is warned about once.

    Raises
    ------
    Exception
        A fault of the device or of its driver: torch would compute on the same device.
    """
    global _launch, _failure
    if _launch is not None or _failure is not None:
        return _launch
    with _lock:
        if _launch is None and _failure is None:
            if not is_on(_SWITCH):
                _failure = f"{_SWITCH}={os.environ[_SWITCH]} turns them off"
                return None
            try:
                import triton

                target = triton.runtime.driver.active.get_current_target()
                if target.backend == "cuda" and target.arch < 80:
                    raise RuntimeError(f"they need compute capability 8.0 or more, this GPU has {target.arch / 10:.1f}")
                from hf_paged_kernels.triton import launch

                _launch = launch
            except Exception as error:  # No Triton, no driver, no compiler for its launcher: it raises what it likes.
                if is_device_fault(error):
                    raise
                _failure = str(error) or type(error).__name__
                warnings.warn(
                    "hf_paged's Triton kernels are not available, and attention gathers its context instead, "
                    f"which is slower: {_failure}. HF_PAGED_TRITON=0 silences this warning.",
                    stacklevel=2,
                )
    return _launch


def find(op: str, arguments: tuple) -> Callable | None:
    """The function that serves this call of an op; None leaves its dtypes, strides or head sizes to torch."""
    launch = load()
    return getattr(launch, op) if launch is not None and _serves(op, arguments) else None


def _serves(op: str, arguments: tuple) -> bool:
    key_cache, value_cache = (arguments[index] for index in _CACHES[op])
    if op == "copy_blocks":
        return key_cache[:1].is_contiguous() and value_cache[:1].is_contiguous()
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        return False
    states = arguments[:2] if op == "write_kv" else arguments[:1]
    if key_cache.dtype in LARGEST_CODE:
        is_served = all(one.dtype in _DTYPES for one in states)
    else:
        is_served = all(one.dtype == cache.dtype for one, cache in zip(states, (key_cache, value_cache)))
        if op == "write_kv":
            return is_served
    dtype = arguments[0].dtype
    return is_served and dtype in _DTYPES and max(key_cache.shape[3], value_cache.shape[3]) <= MAX_DIM[dtype.itemsize]
