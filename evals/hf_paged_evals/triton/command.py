"""Compile the Triton kernels for GPUs that are not here, and hold their machine code against thresholds.

Nothing is run. The roofline is an estimate, not a measurement.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

if TYPE_CHECKING:
    from hf_paged_evals.triton.measure import Measured

NAME = "triton"
# Figures of `Measured`, their columns, and their formats.
_COLUMNS = (
    ("registers", "Registers", ".0f"),
    ("spilled", "Spilled (B)", ".0f"),
    ("shared", "Shared memory", ".0%"),
    ("programs", "Programs", ".0f"),
    ("instructions", "Instructions/token", ".1f"),
    ("wide", "128-bit loads", ".0%"),
    ("buffers", "Tiles in flight", ".0f"),
    ("waits", "Copies under way", ".0f"),
)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this measurement."""
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="sm80, sm90, sm100 or gfx942 (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")


def measure(given: argparse.Namespace) -> Section:
    """Compile and judge every case; under ``--quick`` only those that the tests compile.

    Raises
    ------
    ValueError
        If Triton's interpreter is on, or an architecture is not known.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("nothing is compiled under Triton's interpreter: unset TRITON_INTERPRET")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        from hf_paged_evals.triton.cases import all_cases, few_cases
        from hf_paged_evals.triton.measure import measure_all
        from hf_paged_evals.triton.targets import TARGETS

        if unknown := sorted(set(given.arch or ()) - set(TARGETS)):
            raise ValueError(f"--arch knows {', '.join(TARGETS)}; got {', '.join(unknown)}")
        jobs = few_cases() if given.quick else [(case, target) for target in TARGETS.values() for case in all_cases()]
        jobs = [(case, target) for case, target in jobs if not given.arch or target.arch in given.arch]
        found = []
        for result in measure_all(jobs, given.jobs):
            found.append(result)
            print(f"{len(found)} of {len(jobs)}: {result.arch} {result.case}", file=sys.stderr, flush=True)
    return _section(found)


def _section(found: list["Measured"]) -> Section:
    missed = sum(bool(one.misses) for one in found)
    return Section(
        NAME,
        "Compiled GPU kernels",
        f"{missed} of {len(found)} kernels miss a threshold." if missed else f"All {len(found)} kernels pass.",
        [
            Figure("kernels compiled", len(found), "kernels"),
            Figure("kernels that miss a threshold", missed, "kernels", better="lower"),
            Figure("kernels that spill", sum(one.figures["spilled"] > 0 for one in found), "kernels", better="lower"),
            *_decode_figures(found),
        ],
        [_kernel_table(found), _threshold_table(), _roofline_table(found)],
        notes=["Compiled, not run. A program is one instance of a kernel; programs are those that a processor holds."],
        flags=[f"{one.arch} {one.case}: MISSED: {miss}" for one in found for miss in one.misses],
    )


def _decode_figures(found: Iterable["Measured"]) -> list[Figure]:
    """Of the decode loop that matters most: bfloat16, head 128, GQA 4."""
    from hf_paged_evals.triton.cases import Case

    figures = []
    for one in found:
        if one.case == Case("decode"):
            name, count = f"decode loop, {one.arch}", one.figures["instructions"]
            figures.append(Figure(f"{name}: instructions", count, "per KV token and head", better="lower"))
            if "buffers" in one.figures:
                figures.append(Figure(f"{name}: tiles in flight", one.figures["buffers"], "tiles", better="higher"))
    return figures


def _kernel_table(found: list["Measured"]) -> Table:
    rows = [
        [one.arch, str(one.case)]
        + [format(one.figures[name], style) if name in one.figures else None for name, _, style in _COLUMNS]
        for one in found
    ]
    return Table("Kernels", ["GPU", "Kernel", *(title for _, title, _ in _COLUMNS)], rows)


def _threshold_table() -> Table:
    from hf_paged_evals.triton.thresholds import THRESHOLDS

    rows = [
        [one.figure, str(one), "/".join(one.kernels), "/".join(one.archs), one.anchor or None] for one in THRESHOLDS
    ]
    note = "The anchors were compiled and counted in the same way."
    return Table("Thresholds", ["Figure", "Bound", "Kernels", "GPUs", "Others reach"], rows, note)


def _roofline_table(found: list["Measured"]) -> Table:
    from hf_paged_evals.triton import roofline
    from hf_paged_evals.triton.cases import Case

    decode = {one.arch: one.figures["instructions"] for one in found if one.case == Case("decode")}
    columns, rows = roofline.table(decode)
    note = "Bytes of keys and values over 85 % of the data sheet's bandwidth."
    return Table("Decode attention of one layer, bf16: Estimates, not measurements", columns, rows, note)


main = Script(NAME, __doc__, add_settings, measure).main

if __name__ == "__main__":
    sys.exit(main())
