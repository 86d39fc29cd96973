"""Ahead-of-time compilation of what the ops launch, for GPUs that are not here."""

import contextlib

from triton.runtime import driver

from hf_paged_evals.triton.disassembly import Code, read
from hf_paged_evals.triton.targets import TARGETS, Target
from hf_paged_kernels.triton.kernel_calls import KernelCall


class _NoDriver:
    """Answers what Triton's runtime asks of a driver before it compiles; launches nothing."""

    def __init__(self, target: Target):
        self._target = target

    def get_current_target(self):
        return self._target.gpu_target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target.arch)  # Triton keeps the kernels of each device apart.

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target):
    """Have Triton compile for a target."""
    before = driver._active
    driver.set_active(_NoDriver(target))
    try:
        yield
    finally:
        driver._active = before


def compile_call(call: KernelCall, target: Target) -> Code:
    """Compile one launch as Triton would at its first use, by the same specialisation of its arguments."""
    with compiling_for(target):
        return read(call.kernel.warmup(*call.arguments, grid=call.grid, **call.options))
