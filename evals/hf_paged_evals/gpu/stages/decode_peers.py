"""Decode attention beside the kernels of others, over the same keys and values, at the sizes of the bars."""

from hf_paged_evals.gpu import cases, peers
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.stages.decode import attend_all, describe, make_pools, rates
from hf_paged_evals.gpu.timing import copy_bandwidth
from hf_paged_kernels import ops


def run(context: Context) -> None:
    """Time ours and every peer in turn. A peer whose answers differ from ours by more than rounding is refused."""
    copy = copy_bandwidth(context)
    for case in cases.decode_cases(context.is_dry)[:2]:
        pools = make_pools(context, case)
        context.say(
            "decode_peer", engine="paged", **describe(case), **rates(context, case, attend_all(pools), len(pools), copy)
        )
        expected = ops.paged_attention(*pools[0].attend())  # [rows, num_heads, dim]
        for name, make in peers.DECODE.items():
            try:
                calls = [make(pool, case) for pool in pools]
                error = float((calls[0]().reshape(expected.shape).double() - expected.double()).abs().max())
                if not error <= peers.TOLERANCE:
                    context.refuse(name, f"its answers differ from ours by {error:.3g}")
                    continue
                found = rates(context, case, lambda calls=calls: [call() for call in calls], len(pools), copy)
                context.say("decode_peer", engine=name, **describe(case), **found)
            except Exception as error:  # Absent, or it takes no such call: its own words say which.
                context.refuse(name, error)
            context.free()
