"""The Triton kernels in Triton's interpreter, beside the compiled ones in one process.

Triton settles how a kernel runs when it is defined. So the modules of the kernels, and the part of Triton's own library
that is written as kernels (`tl.sum`, `tl.cdiv` and others), are imported a second time as interpreted copies, which
stay out of `sys.modules`. The interpreter replaces parts of `triton.language` while a kernel runs and leaves some of
them replaced; after each launch all of them are put back.
"""

import contextlib
import functools
import importlib
import sys
from types import ModuleType

import triton
import triton.language as tl

import hf_paged_kernels.triton
from hf_paged_evals.triton import interpreter

_KERNELS = tuple(f"hf_paged_kernels.triton.{name}" for name in ("device", "kernels", "kernel_calls", "launch"))
_LIBRARY = ("triton.language.standard",)
_LANGUAGE = (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.condition, tl.core.tensor_descriptor_base)


@functools.cache
def interpreted_launch() -> ModuleType:
    """A copy of the module `hf_paged_kernels.triton.launch` whose kernels are interpreted, on tensors of the CPU."""
    interpreter.install()
    with _restored(*_LANGUAGE):
        library = _import_copies(_LIBRARY)[_LIBRARY[0]]
        # Each function of the library is a method of tensors, too.
        methods = {name: vars(tl.core.tensor)[name] for name in vars(library).keys() & vars(tl.core.tensor).keys()}
    functions = {name: vars(library)[name] for name in vars(library).keys() & vars(tl).keys()}
    with _restored(hf_paged_kernels.triton):
        copies = _import_copies(_KERNELS)
    kernel_call = copies["hf_paged_kernels.triton.kernel_calls"].KernelCall
    start = kernel_call.launch

    def launch(self) -> None:
        with _restored(*_LANGUAGE), _interpreting():
            for owner, names in ((tl, functions), (tl.core.tensor, methods)):
                for name, function in names.items():
                    setattr(owner, name, function)
            tl.standard = library
            start(self)

    kernel_call.launch = launch
    return copies["hf_paged_kernels.triton.launch"]


@contextlib.contextmanager
def _interpreting():
    """Have Triton define interpreted kernels, and treat constants as the interpreter does."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


@contextlib.contextmanager
def _restored(*owners):
    """Put the attributes of modules and classes back as they were on entry."""
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before):
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


def _import_copies(names: tuple[str, ...]) -> dict[str, ModuleType]:
    """Import modules, and packages with all their modules, a second time, interpreted; `sys.modules` keeps the first.

    Returns
    -------
    dict
        The copies, by name.
    """

    def take() -> dict[str, ModuleType]:
        taken = [name for name in sys.modules if name in names or name.startswith(tuple(f"{name}." for name in names))]
        return {name: sys.modules.pop(name) for name in taken}

    kept = take()
    try:
        with _interpreting():
            for name in names:
                importlib.import_module(name)
    finally:
        copies = take()
        sys.modules.update(kept)
    return copies
