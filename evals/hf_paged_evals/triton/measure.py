"""Compile cases and hold their figures against the thresholds."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from hf_paged_evals.triton.cases import Case
from hf_paged_evals.triton.compile import compile_call
from hf_paged_evals.triton.disassembly import wide_share
from hf_paged_evals.triton.targets import TARGETS, Target
from hf_paged_evals.triton.thresholds import PREFILL_ROWS, THRESHOLDS


@dataclass(frozen=True)
class Measured:
    """The figures of one case on one target, by the names of `Threshold.figure`, and the thresholds missed."""

    case: Case
    arch: str
    figures: dict[str, float]
    misses: list[str]


def measure(case: Case, target: Target) -> Measured:
    """Compile a case for a target and judge it."""
    call = case.call(target)
    code = compile_call(call, target)
    warps = call.options["num_warps"]
    figures = {
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared / target.shared_program,
        "programs": target.programs(code.registers, code.shared, warps),
        "wide": wide_share(code.hot_loop() or code.all),
    }
    if case.kernel not in ("reduce", "write", "copy"):
        options = call.options
        tile = options.get("TILE") or options["PARTS"] * options["PART_TOKENS"]
        figures["instructions"] = len(code.hot_loop()) * warps / tile
        if case.kernel == "prefill":
            figures["instructions"] *= PREFILL_ROWS / options["BLOCK_M"]
        if not target.is_hip:
            figures.update(buffers=code.buffers, waits=code.waits)
    return Measured(case, target.arch, figures, judge(case, target, figures))


def judge(case: Case, target: Target, figures: dict[str, float]) -> list[str]:
    """The thresholds that these figures miss."""
    return [
        f"{threshold.figure} {figures[threshold.figure]:.4g}, must be {threshold}"
        for threshold in THRESHOLDS
        if threshold.figure in figures
        and threshold.applies(case, target)
        and not threshold.is_met(figures[threshold.figure])
    ]


def measure_all(cases: list[tuple[Case, Target]], jobs: int):
    """Measured results in the order of `cases`, compiled by `jobs` processes."""
    if jobs == 1:
        yield from (measure(case, target) for case, target in cases)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_measure_by_name, [(case, target.arch) for case, target in cases])


def _measure_by_name(job: tuple[Case, str]) -> Measured:
    return measure(job[0], TARGETS[job[1]])
