"""Decode attention beside the kernels of others, over the same keys and values, at the sizes of the bars."""

import torch

from hf_paged_evals.gpu import cases, peers
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import OpArguments, OpCase
from hf_paged_evals.gpu.stages.decode import attend_all, describe, make_pools, rates
from hf_paged_evals.gpu.timing import copy_bandwidth
from hf_paged_kernels import ops


def run(context: Context) -> None:
    """Time ours, then one peer after another, each at every size before the next one can fail."""
    copy = copy_bandwidth(context)
    todo = cases.decode_cases(context.is_dry)[:2]
    for case in todo:
        pools = make_pools(context, case)
        found = rates(context, case, attend_all(pools), len(pools), copy)
        context.say("decode_peer", engine="paged", **describe(case), **found)
    for name, make in peers.DECODE.items():
        for case in todo:
            pools = make_pools(context, case)
            try:
                _time_peer(context, name, make, case, pools, copy)
            except Exception as error:  # Absent, or it takes no such call: its own words say which.
                context.refuse(name, error)
            context.free()


def _time_peer(context: Context, name: str, make: peers.Make, case: OpCase, pools: list[OpArguments], copy) -> None:
    """Time a peer, unless its answers differ from ours by more than rounding."""
    expected = ops.paged_attention(*pools[0].attend())  # [rows, num_heads, dim]
    calls = [make(pool, case) for pool in pools]
    error = largest_difference(calls[0](), expected)
    if not error <= peers.TOLERANCE:
        context.refuse(name, f"its answers differ from ours by {error:.3g}")
        return
    found = rates(context, case, lambda: [call() for call in calls], len(pools), copy)
    context.say("decode_peer", engine=name, **describe(case), **found)


def largest_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of any two elements of tensors with as many of them; NaN if there is one."""
    return float((got.reshape(expected.shape).double() - expected.double()).abs().max())
