"""Every op against the reference in float64, with NaN in all unused slots; and a captured step padded to its bucket."""

import torch

from hf_paged_evals.gpu import cases
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import OpArguments, OpCase, make_arguments
from hf_paged_evals.gpu.timing import captured
from hf_paged_kernels import ops, reference
from hf_paged_kernels.quantized import dequantize

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # Of the largest output.


def run(context: Context) -> None:
    """Compare, and record what is wrong and the largest error of each dtype."""
    worst: dict[str, float] = {}
    wrong, todo = 0, cases.accuracy_cases(context.is_dry)
    for seed, case in enumerate(todo):
        error, is_right = check(case, context.device, seed)
        name = case.dtype_name if case.codes is None else f"{case.dtype_name}, {case.engine}"
        worst[name] = max(worst.get(name, 0.0), error if error == error else float("inf"))
        if not is_right:
            wrong += 1
            context.say(
                "wrong_op", op="write_and_attend", dtype=name, heads=str(case.heads), error=error,
                block=case.block_size, rows=len(case.rows), options=str(case.options),
            )  # fmt: skip
    context.say("op_accuracy", cases=len(todo), wrong=wrong, largest_error=worst)
    for op, is_right in (("copy_blocks", _check_copy(context)), ("write_kv", _check_write(context))):
        context.say("moves_bits", op=op, right=is_right)
    for rows in cases.PADDED_ROWS:
        context.say("padded_replay", **check_padded_replay(context, OpCase(rows, cases.LLAMA_8B)))
    if context.device.type != "cuda":
        context.refuse("capture of the padded step", "CUDA graphs need a card: the step ran as it is")


def check(case: OpCase, device: torch.device, seed: int) -> tuple[float, bool]:
    """Run `write_and_attend`, then `paged_attention` over what it wrote.

    Returns
    -------
    (float, bool)
        The largest error as a share of the largest output; and whether it is small, and both calls gave the same bits.
    """
    given = make_arguments(case, device, seed)
    arguments, written = _exact_arguments(given.write_and_attend()), True
    if case.codes is None:
        expected = reference.write_and_attend(*arguments)
        got = ops.write_and_attend(*given.write_and_attend())
    else:  # A code may differ by one, which is more than attention itself may be wrong by.
        got = ops.write_and_attend(*given.write_and_attend())
        expected = reference.paged_attention(*_exact_arguments(given.attend()))
        written = _are_written(given, arguments)
    again = ops.paged_attention(*given.attend())
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    return error, error <= TOLERANCE[case.dtype] and written and torch.equal(got, again)


def _exact_arguments(arguments: tuple) -> list:
    """Copies in float64, codes as they are."""
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize > 1
        else x.clone() if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]  # fmt: skip


def _are_written(given: OpArguments, arguments: list) -> bool:
    """Tell whether quantised pages hold what the reference stores there, but for the rounding of codes."""
    reference.write_kv(*arguments[1:6], *arguments[-2:])
    for codes, scales, exact, exact_scales in zip(
        (given.key_cache, given.value_cache), given.scales, arguments[3:5], arguments[-2:]
    ):
        step = exact_scales.nan_to_num() * (1.01 if codes.dtype == torch.int8 else 32.01)  # From one code to the next.
        got, wanted = (
            dequantize(*pair, torch.float64).nan_to_num() for pair in ((codes, scales), (exact, exact_scales))
        )
        if not ((got - wanted).abs() <= step).all():
            return False
    return True


def _check_copy(context: Context) -> bool:
    given = make_arguments(cases.decode_case(4, 50, cases.HEADS[1]), context.device)
    caches = given.key_cache, given.value_cache
    source, target = (torch.tensor(blocks, device=context.device) for blocks in ([1, 3], [5, 0]))
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        cache[target] = cache[source]
    ops.copy_blocks(*caches, source, target)
    return all(_same_bits(got, want) for got, want in zip(caches, expected))


def _check_write(context: Context) -> bool:
    given = make_arguments(OpCase(((40, 9), (33, 33)), cases.HEADS[1]), context.device)
    caches = given.key_cache, given.value_cache
    expected = [cache.clone() for cache in caches]
    reference.write_kv(given.key, given.value, *expected, given.slot_mapping)
    ops.write_kv(given.key, given.value, *caches, given.slot_mapping)
    return all(_same_bits(got, want) for got, want in zip(caches, expected))


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors of a 16-bit dtype hold the same bits, NaN included."""
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


def check_padded_replay(context: Context, case: OpCase) -> dict:
    """Capture a step of a bucket that holds padding alone, and replay it with the rows of `case` filled in.

    A padding row has slot -1 and context 0: it must write nothing and give zeros.
    """
    given, device, size = make_arguments(case, context.device), context.device, cases.PADDED_BUCKET
    count, width = len(case.rows), given.block_tables.shape[1]
    states = [given.query, given.key, given.value]
    held = [torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=device) for x in states]
    caches = [given.key_cache.clone(), given.value_cache.clone()]
    slots = torch.full((size,), -1, device=device)
    tables = torch.zeros(size, cases.PADDED_WIDTH, dtype=torch.long, device=device)
    lengths = torch.zeros(size, dtype=torch.long, device=device)
    starts = torch.arange(size + 1, device=device)
    results = []

    def step() -> None:
        results[:] = [ops.write_and_attend(*held, *caches, slots, tables, lengths, starts, given.scale)]

    replay = captured(context, step)
    for mine, real in zip(held, states):
        mine[:count] = real
    slots[:count], lengths[:count], tables[:count, :width] = given.slot_mapping, given.context_lens, given.block_tables
    replay()
    expected = ops.write_and_attend(*given.write_and_attend())
    # A larger bucket is split in other ways, so the sums round in other ways.
    error = float((results[0][:count].double() - expected.double()).abs().max() / expected.double().abs().max())
    written = _same_bits(caches[0], given.key_cache) and _same_bits(caches[1], given.value_cache)
    return {
        "rows": count,
        "bucket": size,
        "error": error,
        "right": error <= TOLERANCE[case.dtype],
        "padding_gives_zeros": bool((results[0][count:] == 0).all()),
        "padding_writes_nothing": written,
    }
