"""Attention backends: the implementations of the ops, and which of them serves a call.

Three are built in (see `ops`): "cpp" and "triton" read the pages in place, on CPUs and on GPUs; "torch" gathers them,
on every device, and serves what the others leave. A call goes to the first backend, by priority, whose `find` returns a
function for it. `register` adds a backend, from any package and at any time, and `unregister` takes it away again:

>>> from hf_paged_kernels import backends, reference
>>> mine = backends.Backend("mine", "cpu", lambda op, arguments: getattr(reference, op), priority=20)
>>> backends.register(mine)
>>> backends.unregister("mine") is mine
True

A backend may register its kernels with torch's dispatcher, as "cpp" does: calls on its device then go straight to them
and ask nothing here, as long as it is the first backend of that device.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

OPS = ("write_kv", "copy_blocks", "paged_attention", "write_and_attend", "latent_attention")
Find = Callable[[str, tuple], Callable | None]


@dataclass(frozen=True)
class BackendState:
    """The state of a backend in a process.

    Attributes
    ----------
    available : bool
        Its kernels can be used.
    reason : str or None
        Why they cannot, and the remedy.
    """

    available: bool
    reason: str | None


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops on one type of device.

    Attributes
    ----------
    name : str
        No other registered backend has it.
    device_type : str or None
        ``"cpu"``, ``"cuda"`` (HIP, too) and so on, as of `torch.device`; None: every device.
    find : callable
        ``find(op, arguments)`` returns the function that serves this call, or None to leave it to the next backend.
        The function takes `arguments` as they are: those of the function of that name in `ops`, by position, without
        the last ones that have their defaults. It mutates what `ops` says and owns nothing. `find` runs at every
        call that it is asked for, so it should look at dtypes and shapes only.
    priority : int
        Backends of higher priority are asked first: "cpp" and "triton" have 10, "torch" 0.
    ops : frozenset of str
        The ops that it is asked for, of `OPS`.
    state : callable
        Returns the `BackendState` of this process, for ``hf-paged doctor``; may load the kernels, and raises nothing.
    """

    name: str
    device_type: str | None
    find: Find
    priority: int
    ops: frozenset[str] = frozenset(OPS)
    state: Callable[[], BackendState] = lambda: BackendState(True, None)

    def serves(self, op: str, device_type: str | None) -> bool:
        """Tell whether the backend is asked for an op on a type of device; None: one that no backend names."""
        return op in self.ops and self.device_type in (None, device_type)


_lock = threading.Lock()
_backends: tuple[Backend, ...] = ()  # In the order in which they are asked.
# The `find` of each backend that serves an op on a type of device; under None, on those that no backend names.
_candidates: dict[tuple[str, str | None], tuple[Find, ...]] = {(op, None): () for op in OPS}
_dispatched: dict[str, str] = {}  # Types of devices whose kernels torch's dispatcher has, and the backend of these.
_detours: dict[tuple[str, str], torch.library.Library] = {}  # Lead a dispatched op here again; alive as long as kept.


def register(backend: Backend) -> None:
    """Add a backend; calls that begin from now on ask it. Among equal priorities the first registered comes first.

    Raises
    ------
    ValueError
        If a backend of that name is registered, or it states ops that there are none of.
    """
    if unknown := backend.ops - set(OPS):
        raise ValueError(f"a backend serves ops of {', '.join(OPS)}; got {', '.join(sorted(unknown))}")
    with _lock:
        if any(other.name == backend.name for other in _backends):
            raise ValueError(f"a backend named {backend.name!r} is registered already: unregister it first")
        _set((*_backends, backend))


def unregister(name: str) -> Backend:
    """Take a backend away: calls that begin from now on go to the others. Returns it; `register` puts it back.

    Raises
    ------
    ValueError
        If no backend has that name.
    """
    with _lock:
        found = next((backend for backend in _backends if backend.name == name), None)
        if found is None:
            known = ", ".join(backend.name for backend in _backends)
            raise ValueError(f"no backend is named {name!r}: registered are {known}")
        _set(tuple(backend for backend in _backends if backend is not found))
        return found


def registered() -> tuple[Backend, ...]:
    """All backends, in the order in which they are asked."""
    return _backends


def python_kernel(op: str) -> Callable:
    """The function that torch's dispatcher calls for an op, unless a backend has registered kernels with it."""

    def call(*arguments):
        # Arguments of all ops begin with tensors of the device in question.
        device_type = arguments[0].device.type
        candidates = _candidates.get((op, device_type))
        for find in _candidates[op, None] if candidates is None else candidates:
            function = find(op, arguments)
            if function is not None:
                return function(*arguments)
        raise NotImplementedError(
            f"no backend serves this call of {op} on {device_type}: register the backend torch again, or one for it"
        )

    return call


def note_dispatched(name: str, device_type: str) -> None:
    """Note that a backend has registered kernels for all ops with torch's dispatcher, which sends calls there now."""
    with _lock:
        _dispatched[device_type] = name
        _set(_backends)


def _set(backends: tuple[Backend, ...]) -> None:
    """Replace the registered backends; `_lock` is held. A running `call` reads the old ones or the new ones."""
    global _backends, _candidates
    _backends = tuple(sorted(backends, key=lambda backend: -backend.priority))
    device_types = {backend.device_type for backend in _backends} - {None}
    _candidates = {
        (op, device_type): tuple(backend.find for backend in _backends if backend.serves(op, device_type))
        for op in OPS
        for device_type in (None, *device_types)
    }
    _set_detours()


def _set_detours() -> None:
    """Have torch's dispatcher lead here again for ops that another backend is to be asked for first."""
    wanted = {
        (op, device_type)
        for device_type, name in _dispatched.items()
        for op in OPS
        if next((backend.name for backend in _backends if backend.serves(op, device_type)), None) != name
    }
    for passed in _detours.keys() - wanted:
        del _detours[passed]
    for op, device_type in wanted - _detours.keys():
        detour = torch.library.Library("hf_paged", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # It overrides on purpose.
            detour.impl(op, python_kernel(op), device_type.upper())
        _detours[op, device_type] = detour
