"""The machine: software, card, clocks, bandwidth, matrix products, and what the host spends on launches and copies."""

import os
import platform
import shutil
import subprocess

import psutil
import torch
from torch.nn import functional

from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.timing import copy_bandwidth, device_us, host_us
from hf_paged_evals.runner.machine import processor, versions
from hf_paged_kernels.triton import dispatch

_SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def run(context: Context) -> None:
    """Record the machine and its basic speeds."""
    context.say("machine", machine=_machine(), versions=versions())
    context.say("card", **card(context))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        context.say("nvidia_smi", columns=_SMI, text=(done.stdout or done.stderr).strip())
    else:
        context.refuse("nvidia-smi", "it is not on the path")
    if not context.is_dry:
        state = dispatch.state()
        context.say("triton_kernels", available=state.available, reason=state.reason)
    context.say("copy", tb_s=copy_bandwidth(context) / 1e12)
    _matmul(context)
    _host_costs(context)


def _machine() -> dict:
    """The host. `hf_paged_evals.runner.machine` would compile the CPU kernels, for which there is no time."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none",
    }


def card(context: Context) -> dict:
    """Name, capability, processors, memory and the data sheet's bandwidth of the device."""
    if context.device.type != "cuda":
        return {"name": "CPU, dry run"}
    about = torch.cuda.get_device_properties(context.device)
    found = {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "processors": about.multi_processor_count,
        "memory_gib": about.total_memory / 2**30,
    }
    clock, width = getattr(about, "memory_clock_rate", None), getattr(about, "memory_bus_width", None)
    if clock and width:  # kHz and bits; memory moves data at both edges of its clock.
        found["sheet_tb_s"] = 2 * clock * 1e3 * width / 8 / 1e12
    return found


def _matmul(context: Context) -> None:
    size = 64 if context.is_dry else 8192
    matrix = torch.randn(size, size, device=context.device, dtype=torch.bfloat16)
    micros = device_us(context, lambda: matrix @ matrix)
    context.say("matmul", size=size, dtype="bfloat16", tflops=2 * size**3 / micros / 1e6)


def _host_costs(context: Context) -> None:
    """Measure the host's time for an op, a linear layer, and copies either way."""
    device, count = context.device, 20 if context.is_dry else 1000
    size = 64 if context.is_dry else 4096
    few = torch.zeros(8, device=device)
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    states = torch.randn(32, size, device=device, dtype=torch.bfloat16)
    plain = torch.zeros(4096, dtype=torch.long)
    held = plain.to(device)
    found = {
        "op_us": host_us(context, lambda: few.add_(1), count),
        "linear_us": host_us(context, lambda: functional.linear(states, weight), count),
        "upload_us": host_us(context, lambda: held.copy_(plain), count),
        "download_32_us": host_us(context, lambda: held[:32].tolist(), count),
    }
    if device.type == "cuda":
        pinned = plain.pin_memory()
        found["pinned_upload_us"] = host_us(context, lambda: held.copy_(pinned, non_blocking=True), count)
    context.say("host", **found)
