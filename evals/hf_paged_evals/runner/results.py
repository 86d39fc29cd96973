"""``results.json``: one schema for every run, so that runs can be compared."""

import dataclasses
import datetime
import json
import math
import os
import shlex
from pathlib import Path

from hf_paged_evals.runner.machine import machine, versions
from hf_paged_evals.runner.section import Figure, Plot, Section, Table

SCHEMA = 1
FILE = "results.json"
_KEYS = {"schema", "created", "machine", "versions", "command", "options", "sections"}


def collect(options: dict, sections: list[Section], command: list[str]) -> dict:
    """All that a report says, as JSON-able data.

    Parameters
    ----------
    options : dict
        All that decides the figures besides the machine and the versions; ``model``, ``dtype`` and ``seed`` where the
        run has them.
    command : list of str
        The words that repeat the run.

    Raises
    ------
    ValueError
        If a section does not fit the schema, such as a figure that is no finite number.
    """
    results = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(command),
        "options": options,
        "sections": [dataclasses.asdict(section) for section in sections],
    }
    validate(results)
    return results


def save(results: dict, path: Path) -> None:
    """Write `results` to a file. A reader sees the old file or the new one, never a part of it."""
    validate(results)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def load(path: Path) -> dict:
    """Read and check a ``results.json``, or that of a folder.

    Raises
    ------
    ValueError
        If there is none, or it is not of this schema.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        validate(results)
    except FileNotFoundError as error:
        raise ValueError(
            f"no results at {path}: name a folder that hf-paged eval --out has written, or a results file"
        ) from error
    except (json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of hf-paged eval: {error}") from error
    return results


def validate(results: dict) -> None:
    """Check `results` against the schema.

    Raises
    ------
    ValueError
        With the first fault in its text.
    """
    if not isinstance(results, dict) or _KEYS - results.keys():
        missing = sorted(_KEYS - set(results)) if isinstance(results, dict) else sorted(_KEYS)
        raise ValueError(f"results lack {', '.join(missing)}")
    if results["schema"] != SCHEMA:
        raise ValueError(
            f"results have schema {results['schema']}, this version reads {SCHEMA}: run the evaluation anew"
        )
    for section in results["sections"]:
        _check_section(section_of(section))


def section_of(data: dict) -> Section:
    """A section of ``results["sections"]`` as an object.

    Raises
    ------
    ValueError
        If its fields are not those of the schema.
    """
    try:
        parts = {
            "figures": [Figure(**figure) for figure in data["figures"]],
            "tables": [Table(**table) for table in data["tables"]],
            "plots": [Plot(**plot) for plot in data["plots"]],
        }
        return Section(**{**data, **parts})
    except (KeyError, TypeError) as error:
        raise ValueError(f"a section does not fit the schema: {error}") from error


def _check_section(section: Section) -> None:
    where = f"section {section.task!r}"
    for figure in section.figures:
        numbers = [number for number in (figure.value, figure.low, figure.high) if number is not None]
        if not all(_is_finite(number) for number in numbers):
            raise ValueError(f"{where}: figure {figure.name!r} is {numbers}, not finite numbers")
        if figure.better not in ("higher", "lower", None):
            raise ValueError(f"{where}: figure {figure.name!r} is better {figure.better!r}; higher, lower or None")
    for table in section.tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise ValueError(f"{where}: table {table.title!r} has rows that are not {len(table.columns)} long")
    for plot in section.plots:
        if plot.kind not in ("line", "bar", "heatmap"):
            raise ValueError(f"{where}: plot {plot.title!r} is a {plot.kind!r}; line, bar or heatmap")


def _is_finite(number) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
