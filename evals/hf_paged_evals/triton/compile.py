"""Ahead-of-time compilation of what the ops launch, for GPUs that are not here."""

import contextlib

from triton.runtime import driver

from hf_paged_evals.triton.disassembly import Code, read
from hf_paged_evals.triton.targets import TARGETS, Target
from hf_paged_kernels.triton.ahead import CompileOnlyDriver
from hf_paged_kernels.triton.kernel_calls import KernelCall


@contextlib.contextmanager
def compiling_for(target: Target):
    """Have Triton compile for a target."""
    before = driver._active
    driver.set_active(CompileOnlyDriver(target.gpu_target, list(TARGETS).index(target.arch)))
    try:
        yield
    finally:
        driver._active = before


def compile_call(call: KernelCall, target: Target) -> Code:
    """Compile one launch as Triton would at its first use, by the same specialisation of its arguments."""
    with compiling_for(target):
        return read(call.kernel.warmup(*call.arguments, grid=call.grid, **call.options))


def specialisations(calls: list[KernelCall], target: Target) -> set[tuple[str, str, str]]:
    """The different kernels that Triton would compile for these calls: names, types of arguments, options."""
    with compiling_for(target):
        return {_specialisation(call) for call in calls}


def _specialisation(call: KernelCall) -> tuple[str, str, str]:
    *_, bind = call.kernel.device_caches[driver.active.get_current_device()]
    _, arguments, options = bind(*call.arguments, debug=False, **call.options)
    return call.kernel.__name__, str(arguments), str(sorted(options.items()))
