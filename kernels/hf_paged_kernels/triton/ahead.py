"""Compilation ahead of the first step: every kernel that an attention layer's steps can ask for, on all cores.

What is compiled lies in Triton's cache on disk, under a key made of the kernel, the types and sizes that are compiled
in, the target and the versions of Triton and its tools. A process with the same ones finds it there.
"""

import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_paged_kernels.triton.kernel_calls import (
    KernelCall,
    copy_call,
    heads_of,
    latent_heads_of,
    planned_calls,
    planned_latent_calls,
    write_call,
)
from hf_paged_kernels.triton.launch_plan import Device, possible_plans

_TOKENS = 17  # No size that Triton would take for a special one.


@dataclass(frozen=True)
class AttentionLayer:
    """The part of a model's attention layer and of its pages that is compiled in.

    Attributes
    ----------
    num_heads, num_kv_heads, key_dim, value_dim, block_size : int
    dtype : torch.dtype
        Of queries, keys and values.
    window : int or None
        A query sees its last `window` tokens only.
    has_softcap : bool
    sinks : torch.dtype or None
        Of a score per head without a value; None: there are none.
    expanded_dim : int
        Where keys are latents and values their rope parts, which absorbed attention reads: the size of the keys that
        they are expanded into. 0: they are not.
    codes : torch.dtype or None
        Of quantised pages; None: pages hold states in `dtype`.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None
    has_softcap: bool = False
    sinks: torch.dtype | None = None
    expanded_dim: int = 0
    codes: torch.dtype | None = None


def layer_calls(device: Device, layer: AttentionLayer) -> list[KernelCall]:
    """A call of each kernel that steps of this layer can ask for, with tensors that have no memory.

    States may lie token by token or head by head; the grid and the numbers of a call mean nothing.
    """
    dims = (layer.key_dim, layer.value_dim)
    key_cache, value_cache = (_pages(layer, dim, layer.codes or layer.dtype) for dim in dims)
    key_scales, value_scales = (None if layer.codes is None else _pages(layer, 1, torch.float32) for _ in "kv")
    slots = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    calls = [copy_call(key_cache, value_cache, slots, slots)]
    if key_scales is not None and value_scales is not None:
        calls.append(copy_call(key_scales, value_scales, slots, slots))
    for heads_first in (False, True):
        key, value = (_states(layer.num_kv_heads, dim, layer.dtype, heads_first) for dim in dims)
        calls.append(write_call(key, value, key_cache, value_cache, slots, key_scales, value_scales))
        if layer.expanded_dim:
            calls += _latent_calls(device, layer, heads_first, key_cache, value_cache)
        else:
            query = _states(layer.num_heads, layer.key_dim, layer.dtype, heads_first)
            calls += _attention_calls(device, layer, query, key_cache, value_cache, key_scales, value_scales)
    return calls


def compile_layers(
    layers: Sequence[AttentionLayer], device: Device, num_processes: int | None = None
) -> tuple[int, list[str]]:
    """Compile the kernels of layers for a device into Triton's cache on disk; it need not be here.

    Parameters
    ----------
    num_processes : int, optional
        Processes that compile at the same time; by default one per core.

    Returns
    -------
    num_kernels, failures : int, list of str
        Kernels in the cache now, and a sentence for each that did not compile.
    """
    jobs = [(device, layer, number) for layer in layers for number in range(len(layer_calls(device, layer)))]
    # Not forked: this process may have a CUDA context, which its children must not touch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_compile_for, initargs=(device,)) as pool:
        done = list(pool.map(_compile, jobs))
    failures = sorted({failure for _, failure in done if failure})
    return len({kernel for kernel, _ in done if kernel}), failures


def gpu_target(device: Device) -> GPUTarget:
    """The target for which Triton compiles on a device.

    Raises
    ------
    ValueError
        If its architecture is none that the kernels are made for.
    """
    if match := re.fullmatch(r"sm(\d{2,3})", device.arch):
        if int(match[1]) >= 80:
            return GPUTarget("cuda", int(match[1]), 32)
    elif re.fullmatch(r"gfx9\w+", device.arch):
        return GPUTarget("hip", device.arch, 64)
    raise ValueError(f"there are no kernels for {device.arch}: they need sm80 or newer, or gfx9")


class CompileOnlyDriver:
    """Answers what Triton's runtime asks of a driver before it compiles; launches nothing.

    Parameters
    ----------
    target : GPUTarget
    number : int
        Triton keeps the kernels of each number apart in memory.
    """

    def __init__(self, target: GPUTarget, number: int = 0):
        self._target, self._number = target, number

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


def _pages(layer: AttentionLayer, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Pages without memory, of so many numbers for each token and head: ``[2, num_kv_heads, block_size, size]``."""
    return torch.empty(2, layer.num_kv_heads, layer.block_size, size, dtype=dtype, device="meta")


def _states(num_heads: int, dim: int, dtype: torch.dtype, heads_first: bool) -> torch.Tensor:
    """States without memory, ``[tokens, num_heads, dim]``."""
    shape = (num_heads, _TOKENS, dim) if heads_first else (_TOKENS, num_heads, dim)
    states = torch.empty(shape, dtype=dtype, device="meta")
    return states.transpose(0, 1) if heads_first else states


def _attention_calls(
    device: Device,
    layer: AttentionLayer,
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, key_dim]
    value_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, value_dim]
    key_scales: torch.Tensor | None,  # [num_blocks, num_kv_heads, block_size, 1] float32
    value_scales: torch.Tensor | None,  # [num_blocks, num_kv_heads, block_size, 1] float32
) -> list[KernelCall]:
    numbers = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    out = query.new_empty(*query.shape[:2], layer.value_dim)
    softcap = 30.0 if layer.has_softcap else None
    sinks = None if layer.sinks is None else torch.empty(layer.num_heads, dtype=layer.sinks, device="meta")
    heads = heads_of(query, value_cache)
    return planned_calls(
        device, heads, possible_plans(device, heads, layer.window), out, query, key_cache, value_cache,
        numbers[:, None], numbers, numbers, 0.1, layer.window, softcap, sinks, key_scales, value_scales,
    )  # fmt: skip


def _latent_calls(
    device: Device,
    layer: AttentionLayer,
    heads_first: bool,
    latent_cache: torch.Tensor,  # [num_blocks, 1, block_size, key_dim]
    rope_cache: torch.Tensor,  # [num_blocks, 1, block_size, value_dim]
) -> list[KernelCall]:
    numbers = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    # A product of each head with its weights; and the last part of the queries, which lies where they do.
    query_latent = _states(layer.num_heads, layer.key_dim, layer.dtype, heads_first=True)
    query_rope = _states(layer.num_heads, layer.expanded_dim, layer.dtype, heads_first)[..., -layer.value_dim :]
    heads = latent_heads_of(query_latent, rope_cache)
    return planned_latent_calls(
        device, heads, possible_plans(device, heads, layer.window), torch.empty_like(query_latent), query_latent,
        query_rope, latent_cache, rope_cache, numbers[:, None], numbers, numbers, 0.1, layer.window,
    )  # fmt: skip


def _compile_for(device: Device) -> None:
    """Prepare a process that compiles."""
    driver.set_active(CompileOnlyDriver(gpu_target(device)))


def _compile(job: tuple[Device, AttentionLayer, int]) -> tuple[str | None, str | None]:
    """Compile one kernel. Returns the key under which the cache has it, or a sentence that says why there is none."""
    device, layer, number = job
    call = layer_calls(device, layer)[number]
    try:
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.options).hash, None
    except Exception as error:  # A compiler raises what it likes.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"{call.kernel.__name__} of {layer} for {device.arch}: {reason}"
