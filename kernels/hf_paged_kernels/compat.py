"""Private names of torch that the kernels need. They import nothing of hf_paged, whose own lie in `hf_paged.compat`."""

from typing import Any

import torch


def cpu_dispatch_keys() -> Any:
    """The keys of torch's dispatcher for tensors on the CPU.

    Reads ``torch._C.DispatchKeySet``: kernels from the public ``torch.library.get_kernel`` are called with one.
    """
    return torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
