"""Triton's interpreter made fit for proofs: right bfloat16, a check of every address, a count of every byte.

Kernels are interpreted if they are defined while Triton's switch for it is on. The interpreter as it comes computes
on the bit patterns of bfloat16, truncates where it should round, and reads whatever lies behind a tensor's end.
"""

import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder


class OutOfBoundsError(Exception):
    """A lane reads or writes memory that is not its tensor's."""


@dataclass
class Traffic:
    """Bytes that kernels moved, by the name of the argument they moved them through.

    Attributes
    ----------
    loaded, stored : Counter
        Of all programs.
    by_program : dict
        Loaded, by the programs of all grids: their numbers along every axis.
    """

    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    by_program: defaultdict[tuple[int, ...], Counter] = field(default_factory=lambda: defaultdict(Counter))


_traffic: list[Traffic] = []
_tensors: dict[str, tuple[int, int]] = {}  # Arguments of the running kernel: first address and the one past the last.


@contextlib.contextmanager
def counted_traffic():
    """Count what kernels move while this is open."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


def install() -> None:
    """Patch the interpreter of this process."""
    interpreter._get_np_dtype = _np_dtype
    interpreter.TensorHandle.__init__ = _init_handle
    if _plain_fits is not None:
        interpreter._validate_np_data_size = _fits
    for name in ("create_masked_load", "create_masked_store", "cast_impl", "create_fp_to_fp", "create_bitcast"):
        setattr(_builder, name, globals()[f"_{name}"])
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(_builder, f"create_{name}", _create_cast)
    interpreter.GridExecutor._init_args_hst = _init_args_hst
    interpreter._patch_lang_tensor = _patch_lang_tensor


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest that bfloat16 holds, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(data), np.float32("nan"), rounded.view(np.float32))


# bfloat16 lives as float32 whose values bfloat16 holds; every handle is rounded as it is made.
_plain_np_dtype, _plain_init_handle = interpreter._get_np_dtype, interpreter.TensorHandle.__init__
_plain_fits = getattr(interpreter, "_validate_np_data_size", None)  # Some interpreters do not check a handle's size.
_plain_cast, _plain_init_args = _builder.cast_impl, interpreter.GridExecutor._init_args_hst
_plain_bitcast = _builder.create_bitcast
_plain_fp_to_fp, _plain_patch_tensor = _builder.create_fp_to_fp, interpreter._patch_lang_tensor


def _np_dtype(dtype):
    return np.dtype(np.float32) if dtype.scalar == tl.bfloat16 else _plain_np_dtype(dtype)


def _is_bfloat16(dtype) -> bool:
    return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16


def _fits(data, dtype) -> bool:
    return _is_bfloat16(dtype) or _plain_fits(data, dtype)


def _init_handle(handle, data, dtype, *attributes) -> None:
    _plain_init_handle(handle, round_to_bfloat16(data) if _is_bfloat16(dtype) else data, dtype, *attributes)


def _cast_impl(self, source, target):
    if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
        return _plain_cast(self, source, target)
    return interpreter.TensorHandle(source.data.astype(_np_dtype(target)), target.scalar)


def _create_cast(self, source, target):
    return self.cast_impl(source, target)


def _create_fp_to_fp(self, source, target, rounding):
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return self.cast_impl(source, target)
    return _plain_fp_to_fp(self, source, target, rounding)


def _create_bitcast(self, source, target):
    """Between bfloat16 and what is as wide: its bits are the upper half of those that float32 has."""
    is_bfloat16 = [dtype.scalar == tl.bfloat16 for dtype in (source.dtype, target)]
    if is_bfloat16[0] == is_bfloat16[1]:
        return _plain_bitcast(self, source, target)
    if is_bfloat16[1]:
        bits = source.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.bfloat16)
    bits = (source.data.view(np.uint32) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(bits.view(_plain_np_dtype(target)), target.scalar)


def _create_masked_load(self, pointers, mask, other, *hints):  # Of caches, in one argument or in several.
    dtype = pointers.get_element_ty()
    itemsize = max(1, dtype.primitive_bitwidth // 8)
    counters = [count for traffic in _traffic for count in (traffic.loaded, traffic.by_program[_program()])]
    _check(pointers.data, mask.data, itemsize, counters)
    if dtype != tl.bfloat16:
        memory = _plain_np_dtype(dtype)
        default = np.zeros(pointers.data.shape, memory) if other is None else other.data
        return interpreter.TensorHandle(interpreter._interpreter.load(pointers.data, mask.data, default, memory), dtype)
    bits = interpreter._interpreter.load(
        pointers.data, mask.data, np.zeros(pointers.data.shape, np.uint16), np.dtype(np.uint16)
    )
    data = (bits.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data if other is None else np.where(mask.data, data, other.data), dtype)


def _program() -> tuple[int, ...]:
    return tuple(interpreter.interpreter_builder.grid_idx)


def _create_masked_store(self, pointers, value, mask, *hints):
    dtype = pointers.get_element_ty()
    _check(pointers.data, mask.data, max(1, dtype.primitive_bitwidth // 8), [traffic.stored for traffic in _traffic])
    data = value.data
    if dtype == tl.bfloat16:
        data = (round_to_bfloat16(data).view(np.uint32) >> 16).astype(np.uint16)
    return interpreter._interpreter.store(pointers.data, data, mask.data)


def _init_args_hst(self, args_dev, kwargs):
    args, kwargs = _plain_init_args(self, args_dev, kwargs)
    _tensors.clear()
    for name, value in [*zip(self.arg_names, args), *kwargs.items()]:
        if hasattr(value, "data_ptr") and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
            _tensors[name] = value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
    return args, kwargs


def _patch_lang_tensor(tensor, *scope):
    _plain_patch_tensor(tensor, *scope)
    # Triton 3.5 and 3.6 call int() on an array of one number, which numpy refuses since 2.4.
    tensor.__index__ = lambda self: self.handle.data.item()


def _check(addresses: np.ndarray, mask: np.ndarray, itemsize: int, counters: list[Counter]) -> None:
    """Raise unless all lanes that are not masked lie in one of the kernel's tensors, and in the same."""
    wanted = addresses[np.broadcast_to(mask, addresses.shape)]
    if not wanted.size:
        return
    low, high = int(wanted.min()), int(wanted.max()) + itemsize
    for name, (first, end) in _tensors.items():
        if first <= low < end:
            if high > end:
                raise OutOfBoundsError(f"{name} ends at {end:#x}; a lane reaches {high:#x}")
            for counter in counters:
                counter[name] += wanted.size * itemsize
            return
    raise OutOfBoundsError(f"no argument of the kernel holds {low:#x}")
