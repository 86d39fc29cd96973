"""A device that is none, "fakegpu": what only a GPU has to do, tested on any machine.

Its tensors lie in the host's memory and the CPU's kernels compute on them, but it is as strict as a GPU: an operator
takes no tensors of two devices, memory can run out, and what crosses between host and device is counted. There are two
such devices, "fakegpu:0" and "fakegpu:1". Work on them is over when it begins, so it shows no race between streams.

Once loaded it stays in the process; outside the fixture `fake_device` it says that it is not available.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_paged_kernels import backends, ops
from hf_paged_kernels.cpu.compiler import Compiler, find_compiler, run_compiler
from hf_paged_kernels.cpu.store import cache_folder, has_library, keep_library, lock_library

_SOURCE = Path(__file__).parent / "device.cpp"
_TORCH = Path(torch.__file__).parent


@dataclasses.dataclass
class Traffic:
    """Counts of what happened between host and devices.

    Attributes
    ----------
    uploads, downloads : int
        Copies to and from a device.
    waits : int
        Times at which the host had to wait for a device: copies but those to and from pinned memory that do not
        block, numbers that were read, operators whose result has a size that only their input's content tells.
    launches : int
        Operators that ran on a device.
    """

    uploads: int = 0
    downloads: int = 0
    waits: int = 0
    launches: int = 0


class FakeDevice:
    """The devices, as a test uses them.

    Attributes
    ----------
    device, second : torch.device
    """

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self.device, self.second = torch.device("fakegpu", 0), torch.device("fakegpu", 1)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Traffic]:
        """Yield the traffic of what is entered, complete when it is left."""
        before, traffic = self._count(), Traffic()
        try:
            yield traffic
        finally:
            for name, count in self._count().items():
                setattr(traffic, name, count - before[name])

    @contextlib.contextmanager
    def memory_left(self, num_bytes: int) -> Iterator[None]:
        """Let the devices allocate no more than that, together. What operators return does not count."""
        self._library.fake_device_limit(ctypes.c_int64(self._library.fake_device_held() + num_bytes))
        try:
            yield
        finally:
            self._library.fake_device_limit(ctypes.c_int64(-1))

    def _count(self) -> dict[str, int]:
        return {
            field.name: getattr(self._library, f"fake_device_{field.name}")() for field in dataclasses.fields(Traffic)
        }


class _Module:
    """``torch.fakegpu``: answers what torch and transformers ask of a device's module."""

    __name__ = "torch.fakegpu"
    _is_on = False

    def is_available(self) -> bool:
        return self._is_on

    is_initialized = is_available

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def manual_seed_all(self, seed: int) -> None:
        """The devices draw the random numbers of the CPU's generator."""

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)

    def _is_in_bad_fork(self) -> bool:
        return False


@contextlib.contextmanager
def switched_on() -> Iterator[FakeDevice]:
    """Yield the devices; the ops of `hf_paged_kernels` run on them, with the CPU's kernels."""
    library, module = _load()
    backends.register(backends.Backend("fakegpu", "fakegpu", _find, priority=10))
    module._is_on = True
    try:
        yield FakeDevice(library)
    finally:
        module._is_on = False
        backends.unregister("fakegpu")


@functools.cache
def _load() -> tuple[ctypes.CDLL, _Module]:
    library = ctypes.CDLL(str(_build(find_compiler())))
    for name in ("uploads", "downloads", "waits", "launches", "held"):
        getattr(library, f"fake_device_{name}").restype = ctypes.c_int64
    library.fake_device_register()
    module = _Module()
    torch.utils.rename_privateuse1_backend("fakegpu")
    torch._register_device_module("fakegpu", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return library, module


def _build(compiler: Compiler) -> Path:
    """Compile the device unless it was before."""
    parts = (torch.__version__.encode(), compiler.version.encode(), _SOURCE.read_bytes())
    path = cache_folder() / f"fake-device-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    with lock_library(path):
        if not has_library(path):
            with tempfile.TemporaryDirectory() as scratch:
                built = Path(scratch) / "device.so"
                compiling = ["-std=c++20", "-fPIC", "-shared", "-w", f"-I{_TORCH / 'include'}", str(_SOURCE)]
                run_compiler(compiler, [*compiling, f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(built)])
                keep_library(built, path)
    return path


def _find(op: str, arguments: tuple):
    """The function of an op on a fake device: the CPU's, on the same memory."""

    def call(*arguments):
        device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
        for argument in arguments:
            assert not isinstance(argument, torch.Tensor) or argument.device == device, f"{op} got another device"
        result = getattr(ops, op)(*map(_on_host, arguments))
        return None if result is None else torch.ops.hf_paged_fake_device.on_device(result, device.index)

    return call


def _on_host(argument):
    return torch.ops.hf_paged_fake_device.on_host(argument) if isinstance(argument, torch.Tensor) else argument
