"""The published tables, rendered from results files."""

import fnmatch
import re
from pathlib import Path

from hf_paged_evals.figures import rows
from hf_paged_evals.figures.rows import Row
from hf_paged_evals.report.markdown import table
from hf_paged_evals.report.text import conditions, interval, number
from hf_paged_evals.runner import results

_PLACEHOLDER = re.compile(r"<([^<>]+)>")


def readme_table(old: str, folder: Path) -> str:
    """The table of README.md.

    Parameters
    ----------
    old : str
        The table that stands there. A row whose part has no results file stays as it is.
    folder : Path
        Of the results files.

    Raises
    ------
    ValueError
        If a row has neither results nor a line in `old`, or its results lack a figure.
    """
    columns = ["SmolLM2-135M-Instruct, bfloat16 unless noted", "paged", "dense", "Measured"]
    return _table(columns, [_line(row, old, folder, [row.what]) for row in rows.README])


def benchmarks_table(old: str, folder: Path) -> str:
    """The table of speed and memory of docs/benchmarks.md. Parameters and errors as of `readme_table`."""
    columns = ["What", "Part", "Result", "Measured"]
    lines = [_line(row, old, folder, [row.what, f"`{row.part}`"]) for row in rows.BENCHMARKS]
    return _table(columns, lines)


def accuracy_tables(folder: Path) -> str:
    """A table of all figures for each of `rows.WHOLE_RUNS`.

    Raises
    ------
    ValueError
        If a results file is missing.
    """
    return "\n\n".join(_whole_run(results.load(path_of(part, folder))) for part in rows.WHOLE_RUNS)


def model_types_table(old: str, folder: Path) -> str:
    """The table of docs/models.md; `old`, if there is no results file."""
    path = path_of(rows.MODEL_TYPES, folder)
    if not path.exists():
        return old
    shown = results.load(path)["sections"][0]["tables"][0]
    return table(shown["columns"], shown["rows"])


def path_of(part: str, folder: Path) -> Path:
    """The results file of a part."""
    return folder / f"{part}.json"


def filled(template: str, found: dict) -> str:
    """A template with the values of the figures of one run.

    Raises
    ------
    ValueError
        If no figure fits a name of the template.
    """
    figures = [figure for section in found["sections"] for figure in section["figures"]]

    def value(placeholder: re.Match) -> str:
        values = [figure["value"] for figure in figures if fnmatch.fnmatchcase(figure["name"], placeholder[1])]
        if not values:
            raise ValueError(
                f"the results of {found['command']} have no figure {placeholder[1]!r}: measure the part again"
            )
        low, high = number(min(values)), number(max(values))
        return low if low == high else f"{low} to {high}"

    return _PLACEHOLDER.sub(value, template)


def _line(row: Row, old: str, folder: Path, first_cells: list[str]) -> str:
    """A line of a table, from the results of the row's part or else from the old table."""
    path = path_of(row.part, folder)
    if path.exists():
        found = results.load(path)
        machine = found["machine"]
        measured = f"{found['created'][:10]}, {machine['processor']}, threads: {machine['threads']}"
        return _joined([*first_cells, *(filled(cell, found) for cell in row.cells), measured])
    begin = _joined(first_cells)
    line = next((line for line in old.splitlines() if line.startswith(begin)), None)
    if line is None:
        raise ValueError(f"no line begins with {begin!r}, and {row.part} has no results: measure that part")
    return line


def _table(columns: list[str], lines: list[str]) -> str:
    return "\n".join([_joined(columns), "|" + "---|" * len(columns), *lines])


def _joined(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _whole_run(found: dict) -> str:
    options = found["options"]
    words = f"{conditions(found)}, {options['model']} in {options['dtype']}, seed {options['seed']}"
    lines = [
        ["" if place else section["title"], figure["name"], _with_interval(figure)]
        for section in found["sections"]
        for place, figure in enumerate(section["figures"])
    ]
    command = re.sub(r"--out[ =]\S+", "--out DIR", found["command"])  # The folder's place says nothing to a reader.
    return f"{words}: `{command}`\n\n" + table(["Evaluation", "Figure", "Result"], lines)


def _with_interval(figure: dict) -> str:
    spread = "" if figure.get("low") is None else f" ({interval(figure)})"
    return f"{number(figure['value'])} {figure['unit']}".rstrip() + spread
