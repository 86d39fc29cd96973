"""``hf-paged eval triton``: compile the Triton kernels for GPUs that are not here, and judge the machine code."""

import argparse
import json
import os
import tempfile
from pathlib import Path

_COLUMNS = (("registers", "regs", ".0f"), ("spilled", "spill", ".0f"), ("shared", "smem", ".0%"),
            ("programs", "CTA/SM", ".0f"), ("instructions", "i/tok", ".1f"), ("wide", "128-bit", ".0%"),
            ("buffers", "buffers", ".0f"), ("waits", "waits", ".0f"))  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print the table; 1 if a threshold is missed."""
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("hf-paged eval triton: unset TRITON_INTERPRET: nothing is compiled under the interpreter")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        return _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-paged eval triton", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--arch", action="append", metavar="ARCH", help="sm80, sm90, sm100 or gfx942 (default: all)")
    parser.add_argument("--quick", action="store_true", help="only the kernels that the tests compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    return parser


def _run(options: argparse.Namespace) -> int:
    from .cases import all_cases, few_cases
    from .measure import measure_all
    from .targets import TARGETS

    if unknown := sorted(set(options.arch or ()) - set(TARGETS)):
        raise ValueError(f"--arch knows {', '.join(TARGETS)}; got {', '.join(unknown)}")
    jobs = few_cases() if options.quick else [(case, target) for target in TARGETS.values() for case in all_cases()]
    jobs = [(case, target) for case, target in jobs if not options.arch or target.arch in options.arch]
    print(f"{'compiled, not run':<64}" + "".join(f"{title:>9}" for _, title, _ in _COLUMNS))
    results = []
    for result in measure_all(jobs, options.jobs):
        results.append(result)
        _print_result(result)
    _print_thresholds()
    _print_roofline(results)
    if options.json is not None:
        options.json.write_text(json.dumps({"results": [result.to_json() for result in results]}, indent=1) + "\n")
    missed = sum(bool(result.misses) for result in results)
    print(
        f"\n{missed} of {len(results)} kernels miss a threshold." if missed else f"\nAll {len(results)} kernels pass."
    )
    return 1 if missed else 0


def _print_result(result) -> None:
    cells = "".join(
        f"{format(result.figures[name], style) if name in result.figures else '-':>9}" for name, _, style in _COLUMNS
    )
    print(f"{result.arch:<7} {str(result.case):<56}{cells}", flush=True)
    for miss in result.misses:
        print(f"        MISSED: {miss}")


def _print_thresholds() -> None:
    from .thresholds import THRESHOLDS

    print("\nThresholds, and what others reach (compiled and counted in the same way)")
    for threshold in THRESHOLDS:
        of = f"{'/'.join(threshold.kernels)}, {'/'.join(threshold.archs)}"
        print(f"  {threshold.figure:<13}{threshold!s:<9}{of:<62}{threshold.anchor}".rstrip())


def _print_roofline(results) -> None:
    from . import roofline
    from .cases import Case

    decode = {result.arch: result.figures["instructions"] for result in results if result.case == Case("decode")}
    print("\nEstimates, not measurements: KV bytes over 85% of the data sheet's bandwidth")
    for line in roofline.lines(decode):
        print(f"  {line}")
