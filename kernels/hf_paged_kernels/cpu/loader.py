"""The C++ kernels in this process, the backend "cpp": they are compiled, or found in the cache, at first use.

Environment variables, read at first use: ``HF_PAGED_NATIVE=0`` does without them, ``HF_PAGED_CPU_ISA`` names
the instruction set to use (baseline, avx2, avx512, avx512_bf16), ``HF_PAGED_CACHE`` the folder that keeps what
was compiled, ``CXX`` the compiler.
"""

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import hf_paged_kernels.custom_ops  # noqa: F401  Defines the ops that the kernels register themselves for.
from hf_paged_kernels import backends
from hf_paged_kernels.backends import BackendState
from hf_paged_kernels.compat import cpu_dispatch_keys
from hf_paged_kernels.cpu.build import build_kernels, library_path
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler
from hf_paged_kernels.cpu.store import has_library, load_library, open_library
from hf_paged_kernels.switches import is_on

_SWITCH = "HF_PAGED_NATIVE"
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_path: Path | None = None
_kernels: dict[str, Callable] = {}  # By op, once they are loaded.
_failure: str | None = None  # Why they will not run in this process; None: they do, or were not tried.


@dataclass(frozen=True)
class NativeState(BackendState):
    """The state of the C++ kernels in a process.

    Attributes
    ----------
    path : pathlib.Path or None
        The compiled library.
    isa : str or None
        The instruction set in use, if loaded.
    isas : tuple of str
        Those that can be asked for with ``HF_PAGED_CPU_ISA``, if loaded.
    compiler : str or None
        The command that compiles them.
    """

    path: Path | None
    isa: str | None
    isas: tuple[str, ...]
    compiler: str | None


def state() -> NativeState:
    """The state of the C++ kernels in this process. Compiles nothing; loads them if they are compiled."""
    compiler, path, reason, is_compiled = None, _path, None, False
    try:
        found = find_compiler()
        compiler, path = " ".join(found.command), path or library_path(found)
        is_compiled = has_library(path)
    except BuildError as error:
        reason = str(error)
    if _library is None and _failure is None and is_on(_SWITCH) and is_compiled:
        load()
    if _library is not None:
        return NativeState(True, None, _path, isa(), isas(), compiler)
    if not is_on(_SWITCH):
        reason = f"{_SWITCH}={os.environ[_SWITCH]} turns them off"
    elif _failure is not None:
        reason = _failure
    elif reason is None:
        reason, path = "not compiled yet: they will be at first use, or run `hf-paged build`", None
    return NativeState(False, reason, path, None, (), compiler)


def load() -> bool:
    """Load the C++ kernels, compiled now if need be. Returns True if they are registered for the ops.

    A failure is remembered and warned about once.
    """
    global _library, _path, _failure
    if _library is not None:
        return True
    if _failure is not None or not is_on(_SWITCH):
        return False
    with _lock:
        if _library is None and _failure is None:
            try:
                path = build_kernels(find_compiler())
                library = _open(path)
            except BuildError as error:
                _failure = str(error)
                warnings.warn(
                    "hf_paged's native CPU kernels are not available, and attention gathers its context instead, "
                    f"which is several times slower: {error}\nThen run `hf-paged build`. "
                    "HF_PAGED_NATIVE=0 silences this warning.",
                    stacklevel=2,
                )
            else:
                _kernels.update(_registered_kernels())
                _library, _path = library, path
                backends.note_dispatched("cpp", "cpu")
    return _library is not None


def find(op: str, arguments: tuple) -> Callable | None:
    """The C++ kernel of an op, which serves every call; None if the kernels cannot be used in this process.

    What a kernel is not made for, it hands on to ``<op>_torch`` itself.
    """
    return _kernels[op] if load() else None


def isas() -> tuple[str, ...]:
    """Instruction sets that this processor has kernels for, the widest last. The kernels must be loaded."""
    return tuple(_loaded().hf_paged_isas().decode().split())


def isa() -> str:
    """The instruction set in use. The kernels must be loaded."""
    return _loaded().hf_paged_isa().decode()


def use_isa(name: str) -> None:
    """Use the kernels of one instruction set from now on, in every thread. The kernels must be loaded.

    Raises
    ------
    ValueError
        If this processor has none of that name.
    """
    if not _loaded().hf_paged_use_isa(name.encode()):
        raise ValueError(f"this processor has no kernels for {name!r}: use one of {', '.join(isas())}")


def _loaded() -> ctypes.CDLL:
    assert _library is not None, "load() has not returned True"
    return _library


def _registered_kernels() -> dict[str, Callable]:
    """The kernels that the library has just registered with torch's dispatcher, callable without it."""
    keys = cpu_dispatch_keys()  # Kernels in C++ do not read them.
    return {op: partial(torch.library.get_kernel(f"hf_paged::{op}", "CPU").call_boxed, keys) for op in backends.OPS}


def _open(path: Path) -> ctypes.CDLL:
    descriptor = open_library(path)
    if descriptor is None:
        raise BuildError(f"{path} was changed or deleted as soon as it was compiled: start the program again")
    library = load_library(descriptor, path)  # Its kernels register themselves for the ops.
    try:
        library.hf_paged_isas.restype = library.hf_paged_isa.restype = ctypes.c_char_p
        library.hf_paged_use_isa.restype, library.hf_paged_use_isa.argtypes = ctypes.c_bool, [ctypes.c_char_p]
    except AttributeError as error:
        raise BuildError(f"{path} holds no kernels ({error}): set CXX to another C++ compiler") from error
    asked = os.environ.get("HF_PAGED_CPU_ISA", "").strip()
    if asked and not library.hf_paged_use_isa(os.fsencode(asked.lower())):
        warnings.warn(
            f"HF_PAGED_CPU_ISA={asked} is not one of {library.hf_paged_isas().decode()}: "
            f"{library.hf_paged_isa().decode()} is used",
            stacklevel=2,
        )
    return library


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A process that is forked while another thread compiles has the lock, and no thread that will open it.
    os.register_at_fork(after_in_child=_renew_lock)
