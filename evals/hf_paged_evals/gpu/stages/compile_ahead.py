"""Every kernel of the later stages into Triton's cache, on all cores: one by one they would take minutes."""

import os
import pickle
import time
from collections.abc import Sequence

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_paged_evals.gpu import cases
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import OpCase
from hf_paged_kernels.triton.kernel_calls import attention_calls, write_call
from hf_paged_kernels.triton.launch_plan import Device

_DRY_DEVICE = Device("sm90", 132)
_SPARE_CORES = 1


def run(context: Context) -> None:
    """Compile what the later stages launch, in forked workers that never touch CUDA."""
    device = _DRY_DEVICE if context.is_dry else _probe()
    if device.is_hip:
        context.refuse("ahead compilation", "it is written for CUDA targets")
        return
    todo = all_cases(context.is_dry)
    shares = divide(todo, max(1, (os.cpu_count() or 1) - _SPARE_CORES))
    began = time.monotonic()
    workers = [_start_worker(context, device, share) for share in shares]
    for worker in workers:
        os.waitpid(worker, 0)
    context.say("compiled", arch=device.arch, calls=len(todo), workers=len(shares), seconds=time.monotonic() - began)


def all_cases(is_dry: bool) -> list[OpCase]:
    """The calls of every later stage; in a dry run two of them, for that is no trial of Triton."""
    found = [*cases.accuracy_cases(is_dry), *cases.decode_cases(is_dry), *cases.prefill_cases(is_dry)]
    if is_dry:
        return found[:2]
    padded = [OpCase(((cases.PADDED_WIDTH * 16, 1),) * cases.PADDED_BUCKET, cases.LLAMA_8B)]
    return list(dict.fromkeys([*found, *padded, *cases.model_cases()]))


def divide(todo: Sequence[OpCase], most: int) -> list[list[OpCase]]:
    """Shares of about one size for at most so many workers.

    Calls that differ in the lengths of their rows alone often take the same kernels, so they stay together: two workers
    would compile these at the same time, and neither would find what the other has done.
    """
    groups: dict[tuple, list[OpCase]] = {}
    for case in todo:
        groups.setdefault(kernels_of(case), []).append(case)
    shares: list[list[OpCase]] = [[] for _ in range(min(most, len(groups)))]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares


def kernels_of(case: OpCase) -> tuple:
    """The part of a case, beside the lengths of its rows, that decides which kernels a call takes."""
    is_decode = case.num_tokens == len(case.rows)
    return case.heads, case.dtype, case.block_size, case.options, case.codes, is_decode


def _probe() -> Device:
    """The card, asked in a child: workers that are forked after CUDA was initialised may not be sound."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            about = torch.cuda.get_device_properties(0)
            name = about.gcnArchName.split(":")[0] if torch.version.hip else f"sm{about.major}{about.minor}"
            os.write(writer, pickle.dumps((name, about.multi_processor_count)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    if not found:
        raise RuntimeError("the card did not answer: its properties could not be read in a fresh process")
    return Device(*pickle.loads(found))


def _start_worker(context: Context, device: Device, todo: Sequence[OpCase]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        driver.set_active(_Target(device))
        launchers = 0
        for case in todo:
            try:
                launchers += compile_case(case, device)
            except Exception as error:
                context.say("compile_error", case=case, error=repr(error))
        if todo and not launchers:
            context.refuse("launchers ahead of time", "Triton has none to build here, or it takes a card")
    finally:
        os._exit(0)


class _Target:
    """Answers what Triton's runtime asks of a driver before it compiles; launches nothing."""

    def __init__(self, device: Device):
        self._target = GPUTarget("cuda", int(device.arch.removeprefix("sm")), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: OpCase, device: Device) -> int:
    """Compile the kernels of one call, by the specialisation that the runtime itself would choose.

    Returns
    -------
    int
        The launchers that were built with them, where Triton has a C launcher for each signature.
    """
    heads, dtype = case.heads, case.dtype
    num_tokens, num_rows = case.num_tokens, len(case.rows)
    # Shapes and addresses alone matter: the pool is one block, of which no byte is read.
    query = torch.empty(num_tokens, heads.num_heads, heads.dim, dtype=dtype)
    key, value = (torch.empty(num_tokens, heads.num_kv_heads, heads.dim, dtype=dtype) for _ in "kv")
    shape = (1, heads.num_kv_heads, case.block_size)
    caches = [torch.empty(*shape, heads.dim, dtype=case.codes or dtype) for _ in "kv"]
    scales = [torch.empty(*shape, 1) for _ in "kv" if case.codes is not None]
    slots, lengths = torch.zeros(num_tokens, dtype=torch.long), torch.zeros(num_rows, dtype=torch.long)
    widest = max(1, *(-(-context // case.block_size) for context, _ in case.rows))
    tables = torch.zeros(num_rows, widest, dtype=torch.long)
    starts = torch.zeros(num_rows + 1, dtype=torch.long)
    options = case.options
    sinks = torch.empty(heads.num_heads, dtype=dtype) if options.has_sinks else None
    scale = heads.dim**-0.5
    chosen = (scale, options.window, options.softcap, sinks)
    attention = (query.clone(), query, *caches, tables, lengths, starts, *chosen, *scales)
    built = 0
    for call in [write_call(key, value, *caches, slots, *scales), *attention_calls(device, *attention)]:
        built += _build_launcher(call.kernel.warmup(*call.arguments, grid=call.grid, **call.options))
    return built


def _build_launcher(compiled) -> int:
    """Build the C launcher of a compiled kernel, which a first launch would wait for; 0 where there is none."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # No such class, no libcuda to link with: the first launch builds what it needs.
        return 0
    return 1
