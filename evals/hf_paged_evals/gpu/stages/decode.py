"""Decode attention: bytes of keys and values a second, eager and captured, beside a copy of the same card."""

from collections.abc import Callable

import torch

from hf_paged_evals.gpu import cases
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import OpArguments, OpCase, make_arguments
from hf_paged_evals.gpu.timing import captured, copy_bandwidth, device_us, host_us
from hf_paged_kernels import ops

_ROTATED_BYTES = 400 << 20  # Pools that take turns: no cache of a card holds what is read next.
_MOST_POOLS = 4


def run(context: Context) -> None:
    """Time every decode case."""
    copy = copy_bandwidth(context)
    context.say("copy", tb_s=copy / 1e12)
    for case in cases.decode_cases(context.is_dry):
        try:
            context.say("decode", engine=case.engine, **describe(case), **time_paged(context, case, copy))
        except torch.OutOfMemoryError as error:
            context.refuse(f"decode {case.engine} {describe(case)}", error)
        context.free()


def describe(case: OpCase) -> dict:
    """The case in the words of a line."""
    lengths = [length for length, _ in case.rows]
    return {
        "rows": len(lengths),
        "context": max(lengths),
        "ragged": min(lengths) != max(lengths),
        "heads": str(case.heads),
        "block": case.block_size,
        "dtype": case.dtype_name,
    }


def time_paged(context: Context, case: OpCase, copy: float) -> dict:
    """Time `ops.paged_attention`.

    Parameters
    ----------
    copy : float
        Bytes a second of a copy.
    """
    pools = make_pools(context, case)
    one = pools[0].attend()
    return {
        **rates(context, case, attend_all(pools), len(pools), copy),
        "host_us": host_us(context, lambda: ops.paged_attention(*one), 3 if context.is_dry else 100),
    }


def make_pools(context: Context, case: OpCase) -> list[OpArguments]:
    """As many pools as one needs to read from memory instead of from a cache."""
    count = max(1, min(_MOST_POOLS, _ROTATED_BYTES // case.kv_bytes))
    return [make_arguments(case, context.device, seed, with_nan=False) for seed in range(count)]


def attend_all(pools: list[OpArguments]) -> Callable[[], None]:
    """A function that attends over each pool in turn."""
    calls = [pool.attend() for pool in pools]

    def attend() -> None:
        for arguments in calls:
            ops.paged_attention(*arguments)

    return attend


def rates(context: Context, case: OpCase, run_all: Callable[[], object], num_pools: int, copy: float) -> dict:
    """Microseconds of a call, eager and captured, and the bytes a second of the faster."""
    found: dict[str, object] = {"eager_us": device_us(context, run_all) / num_pools}
    best = found["eager_us"]
    if context.device.type == "cuda":
        try:
            best = found["captured_us"] = device_us(context, captured(context, run_all)) / num_pools
        except Exception as error:  # Not everything can be captured; the time it takes without is known.
            found["not_captured"] = repr(error)
    return {**found, "tb_s": case.kv_bytes / best / 1e6, "of_copy": case.kv_bytes / best * 1e6 / copy}
