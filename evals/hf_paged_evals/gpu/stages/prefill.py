"""Prefill attention out of the pages: TFLOP/s, beside torch's backends on the same prompts."""

from hf_paged_evals.gpu import cases, peers
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import OpCase, make_arguments
from hf_paged_evals.gpu.stages.decode_peers import largest_difference
from hf_paged_evals.gpu.timing import device_us
from hf_paged_kernels import ops


def run(context: Context) -> None:
    """Time ours first, in every case; then the peers, one of which might take the process with it."""
    todo = cases.prefill_cases(context.is_dry)
    for case in todo:
        given = make_arguments(case, context.device, with_nan=False).attend()
        micros = device_us(context, lambda given=given: ops.paged_attention(*given))
        context.say("prefill", engine=case.engine, **describe(case), us=micros, tflops=flop(case) / micros / 1e6)
    for case in todo:
        if (
            case.codes is None and case.rows[0][0] == case.rows[0][1]
        ):  # torch's causal mask is that of a prompt without a past.
            _time_peers(context, case)


def describe(case: OpCase) -> dict:
    """The case in the words of a line."""
    length, queries = case.rows[0]
    return {"rows": len(case.rows), "queries": queries, "context": length, "heads": str(case.heads)}


def flop(case: OpCase) -> float:
    """Operations of both products, of those scores only that a causal mask leaves."""
    seen = sum(queries * (length - queries) + queries * (queries + 1) / 2 for length, queries in case.rows)
    return 4 * case.heads.num_heads * case.heads.dim * seen


def _time_peers(context: Context, case: OpCase) -> None:
    given = make_arguments(case, context.device, with_nan=False)
    expected = ops.paged_attention(*given.attend())  # [num_tokens, num_heads, dim]
    for name, make in peers.PREFILL.items():
        try:
            call = make(given, case)
            error = largest_difference(call(), expected)
            if not error <= peers.TOLERANCE:
                context.refuse(name, f"its answers differ from ours by {error:.3g}")
                continue
            micros = device_us(context, call)
            context.say("prefill", engine=name, **describe(case), us=micros, tflops=flop(case) / micros / 1e6)
        except Exception as error:  # It takes no such call: its own words say why.
            context.refuse(f"{name}, {describe(case)}", error)
        context.free()
