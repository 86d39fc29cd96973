"""Where a decode step's time goes on the host: torch's profiler by operator, and Python's by function."""

import cProfile
import io
import pstats

import torch
from torch.profiler import ProfilerActivity, profile

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.generation import greedy

_TOP = 12
_LINES = 40


def run(context: Context) -> None:
    """Profile a short call, each way; whole tables go to files beside the lines."""
    shape = models.TINY if context.is_dry else models.LLAMA_1B
    rows, prompt, new = (2, 24, 4) if context.is_dry else (32, 256, 16)
    model = models.llama(shape, context.device)
    ids = models.prompts(context, shape, rows, prompt)
    for engine, fields in models.capture_modes(context):
        models.page(model, memory_budget=2 * rows * (prompt + new + 64) * shape.kv_bytes_a_token, **fields)
        for _ in range(2):
            greedy(model, ids, new)
        name = engine.replace(" ", "-")
        _by_operator(context, engine, lambda: greedy(model, ids, new), f"profile-{name}.txt")
        _by_function(context, lambda: greedy(model, ids, new), f"functions-{name}.txt")


def _by_operator(context: Context, engine: str, call, file: str) -> None:
    activities = [ProfilerActivity.CPU]
    if context.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        call()
        context.synchronize()
    averages = found.key_averages()
    orders = ["self_cpu_time_total"] + ["self_device_time_total"] * (context.device.type == "cuda")
    tables = [averages.table(sort_by=order, row_limit=_LINES) for order in orders]
    (context.out / file).write_text("\n".join(tables), encoding="utf-8")
    top = sorted(averages, key=lambda one: -one.self_cpu_time_total)[:_TOP]
    context.say(
        "profile", engine=engine, file=file, torch=torch.__version__,
        top=[[one.key[:50], one.count, one.self_cpu_time_total / 1e3] for one in top],
    )  # fmt: skip


def _by_function(context: Context, call, file: str) -> None:
    profiler, text = cProfile.Profile(), io.StringIO()
    profiler.runcall(call)
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(_LINES)
    (context.out / file).write_text(text.getvalue(), encoding="utf-8")
