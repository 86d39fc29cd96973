"""The README's table of results, from committed runs.

python -m hf_paged_evals.report.readme [README.md]

Every ``evals/results/*.json`` gives a table: date, machine and command above it, a row for each figure.
"""

import argparse
import re
from pathlib import Path

from hf_paged_evals.suite.results import load

from .markdown import table
from .text import interval, number

MARKS = "<!-- results -->", "<!-- /results -->"
RUNS = Path(__file__).resolve().parent.parent / "results"
README = RUNS.parents[2] / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=README, help="whose table is replaced")
    path = parser.parse_args().file
    path.write_text(replaced(path.read_text(encoding="utf-8"), tables()), encoding="utf-8")


def replaced(text: str, results: str) -> str:
    """`text` with what lies between the marks replaced.

    Raises
    ------
    ValueError
        If the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"the file must hold {MARKS[0]} and, after it, {MARKS[1]}: the table goes between them")
    return f"{before}{begin}\n{results}\n{end}{after}"


def tables(folder: Path = RUNS) -> str:
    """A table for each run in `folder`, in the order of their names.

    Raises
    ------
    ValueError
        If there is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no results: copy a run's results.json there")
    return "\n\n".join(_run(load(path)) for path in paths)


def _run(results: dict) -> str:
    machine, options, versions = results["machine"], results["options"], results["versions"]
    words = ", ".join(
        [
            f"{results['created'][:10]}, {machine['processor']}, threads: {machine['threads']}",
            f"CPU kernels {machine['CPU kernels']}",
            *(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions),
            f"{options['model']} in {options['dtype']}, seed {options['seed']}",
        ]
    )
    rows = [
        ["" if place else section["title"], figure["name"], _value(figure)]
        for section in results["sections"]
        for place, figure in enumerate(section["figures"])
    ]
    command = re.sub(r"--out[ =]\S+", "--out DIR", results["command"])  # Where it lay says nothing to a reader.
    return f"{words}: `{command}`\n\n" + table(["Evaluation", "Figure", "Result"], rows)


def _value(figure: dict) -> str:
    spread = "" if figure.get("low") is None else f" ({interval(figure)})"
    return f"{number(figure['value'])} {figure['unit']}".rstrip() + spread


if __name__ == "__main__":
    main()
