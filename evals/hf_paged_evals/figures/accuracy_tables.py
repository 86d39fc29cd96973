"""The tables of results on the documentation's page of benchmarks, from committed runs.

python -m hf_paged_evals.report.benchmarks_page

Every ``results/*.json`` of the package gives a table: date, machine and command above it, a row for each figure.
"""

import argparse
import re
from pathlib import Path

from hf_paged_evals.doc_pages import find_page, rewrite
from hf_paged_evals.suite.results import load

from .markdown import table
from .text import interval, number

RUNS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rewrite("results", tables(), find_page("benchmarks.md"))


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
