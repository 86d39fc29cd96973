"""``hf-paged eval figures``: measure the published figures, and rewrite the tables of README.md and docs/."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hf_paged.errors import PagedError
from hf_paged_evals.figures.pages import Checkout, own_checkout
from hf_paged_evals.figures.parts import DATASET, MODEL, PARTS, Part, parts_named
from hf_paged_evals.figures.tables import path_of
from hf_paged_evals.runner import results

_DESCRIPTION = """Measure the published figures, and rewrite the tables of README.md, docs/benchmarks.md and
docs/models.md. Each part is a run of its own, with results in evals/results/. A row whose part has no results file
stays as it stands. All parts together take hours: let nothing else run on the machine."""


def main(argv: list[str] | None = None) -> int:
    """Measure the parts that `argv` names and rewrite the pages; returns the exit code.

    Raises
    ------
    PagedError
        If a run fails.
    ValueError
        If there is no such part, no checkout, or a trial would change the pages of this checkout.
    """
    given = _parser().parse_args(argv)
    parts = parts_named(given.only) if given.only else list(PARTS)
    if given.list:
        for part in parts:
            print(f"{part.name:22} hf-paged eval {shlex.join(part.words)}")
        return 0
    checkout = _checkout(given)
    for part in [] if given.tables else parts:
        print(f"{part.name}: hf-paged eval {shlex.join(words_of(part, given))}", flush=True)
        measure(part, given, checkout.results, run_in_a_process)
    pages = checkout.rewrite()
    print(f"rewritten: {', '.join(map(str, pages)) or 'nothing'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-paged eval figures", description=_DESCRIPTION)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="measure these parts, by name or by the name without its dtype, such as throughput",
    )
    parser.add_argument("--list", action="store_true", help="list the parts and what they run, and stop")
    parser.add_argument("--tables", action="store_true", help="measure nothing: only rewrite the tables")
    parser.add_argument(
        "--checkout", type=Path, metavar="DIR", help="holds README.md, docs/ and evals/results/ (default: this one)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", default=Path("eval-report", "figures"), help="of runs that are not finished"
    )
    trial = parser.add_argument_group("a trial, on a copy of the pages")
    trial.add_argument("--quick", action="store_true", help="small settings")
    trial.add_argument("--model", help="instead of the demo model")
    trial.add_argument("--dataset", metavar="FILE", help="instead of ShareGPT")
    return parser


def _checkout(given: argparse.Namespace) -> Checkout:
    own = own_checkout()
    chosen = own if given.checkout is None else Checkout(given.checkout.resolve())
    if chosen is None:
        raise ValueError("hf-paged was installed without its pages: name a checkout with --checkout DIR")
    if chosen == own and (given.quick or given.model or given.dataset):
        raise ValueError(
            "figures of --quick, --model or --dataset are not published: copy README.md, docs/ and evals/results/, and "
            "name the copy with --checkout DIR"
        )
    return chosen


def words_of(part: Part, given: argparse.Namespace) -> list[str]:
    """The words of a part's run, with those of a trial."""
    words = [*part.words, *(part.quick if given.quick else ())]
    for name in (MODEL, DATASET):
        if name in part.takes and getattr(given, name) is not None:
            words += [f"--{name}", getattr(given, name)]
    return words


def run_in_a_process(words: list[str]) -> int:
    """Run ``hf-paged eval`` in a process of its own, so that no part is disturbed by what another left."""
    return subprocess.run([sys.executable, "-m", "hf_paged.cli", "eval", *words]).returncode


def measure(part: Part, given: argparse.Namespace, folder: Path, run: Callable[[list[str]], int]) -> None:
    """Run a part and put its results file into `folder`.

    A run that was cut off goes on where it was; one that was finished starts anew.

    Parameters
    ----------
    run : callable
        Takes the words after ``hf-paged eval`` and returns an exit code.

    Raises
    ------
    PagedError
        If the run fails.
    """
    work = given.work / part.name
    work.mkdir(parents=True, exist_ok=True)
    found = work / results.FILE
    code = run([*words_of(part, given), "--out", str(work if part.is_report else found)])
    if not found.exists():
        raise PagedError(f"{part.name} ended with {code} and left no results: its own message says why")
    results.save(results.load(found), path_of(part.name, folder))
    shutil.rmtree(work)
