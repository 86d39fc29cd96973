"""Other launch plans of the decode kernel than the one that is chosen: whether a better one was left out."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

from hf_paged_evals.gpu import cases
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.stages.decode import attend_all, describe, make_pools
from hf_paged_evals.gpu.timing import captured, device_us
from hf_paged_kernels import ops
from hf_paged_kernels.triton import kernel_calls
from hf_paged_kernels.triton.launch_plan import AttentionPlan

# Fields of `AttentionPlan` to change; a function takes the value that was chosen.
_CHANGES = {
    "as chosen": {},
    "2 stages": {"stages": lambda stages: 2},
    "4 stages": {"stages": lambda stages: 4},
    "half the tile": {"parts": lambda parts: max(1, parts // 2), "tile": lambda tile: max(16, tile // 2)},
    "8 warps": {"warps": lambda warps: 8},
    "half the splits": {"splits": lambda splits: max(1, splits // 2)},
    "twice the splits": {"splits": lambda splits: 2 * splits},
    "four times the splits": {"splits": lambda splits: 4 * splits},
    "half the extra splits": {"extra": lambda extra: extra // 2},
    "twice the extra splits": {"extra": lambda extra: 2 * extra},
}
_FIELDS = {field.name for field in fields(AttentionPlan)}
CHANGES = {name: change for name, change in _CHANGES.items() if change.keys() <= _FIELDS}
_SIZES = ((32, 1024), (8, 2048), (1, 16384))


def run(context: Context) -> None:
    """Time each plan, captured, and hold its answers against those of the plan that is chosen."""
    if context.device.type != "cuda":
        context.refuse("other plans", "the CPU kernels have none")
        return
    for size in _SIZES:
        case = cases.decode_case(*size)
        pools = make_pools(context, case)
        expected = ops.paged_attention(*pools[0].attend())
        for name, change in CHANGES.items():
            try:
                with plans_changed(change):
                    error = float((ops.paged_attention(*pools[0].attend()) - expected).abs().max())
                    micros = device_us(context, captured(context, attend_all(pools)), 40) / len(pools)
                context.say(
                    "plan", plan=name, **describe(case), us=micros, tb_s=case.kv_bytes / micros / 1e6, error=error
                )
            except Exception as error:  # A plan may need more than the card has.
                context.refuse(f"plan {name}, {size}", error)


@contextlib.contextmanager
def plans_changed(change: dict) -> Iterator[None]:
    """Have the kernels launched by other plans while this is open."""
    chosen = kernel_calls.attention_plans

    def changed(*arguments):
        return tuple(
            replace(plan, **{name: new(getattr(plan, name)) for name, new in change.items()})
            for plan in chosen(*arguments)
        )

    kernel_calls.attention_plans = changed
    try:
        yield
    finally:
        kernel_calls.attention_plans = chosen
