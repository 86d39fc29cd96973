"""Two runs side by side: ``hf-paged eval compare A B``."""

import argparse
from pathlib import Path

from hf_paged_evals.report.markdown import table
from hf_paged_evals.report.text import NONE, facts, interval, number
from hf_paged_evals.runner.results import load

_COLUMNS = ["Task", "Figure", "Unit", "A", "A, 95 %", "B", "B, 95 %", "B - A", "B / A", "Verdict"]
_OF_EVERY_RUN = {"Date", "Command"}


def main(argv: list[str] | None = None) -> int:
    """Print two runs side by side; returns the exit code.

    Raises
    ------
    ValueError
        As `compare`.
    """
    parser = argparse.ArgumentParser("hf-paged eval compare", description="The figures of two runs, side by side.")
    parser.add_argument("first", type=Path, help="a folder that hf-paged eval wrote, or a results file")
    parser.add_argument("second", type=Path, help="the same of the other run")
    arguments = parser.parse_args(argv)
    print(compare(arguments.first, arguments.second))
    return 0


def compare(first: Path, second: Path) -> str:
    """The figures of two runs, and all else in which they differ, as Markdown.

    Parameters
    ----------
    first, second : Path
        A ``results.json``, or a folder that holds one.

    Raises
    ------
    ValueError
        If one of them is not there, is not of this version's schema, or they have no figure in common.
    """
    a, b = load(first), load(second)
    ours, theirs = _figures(a), _figures(b)
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise ValueError(
            f"{first} and {second} have no figure in common: their tasks are {_tasks(a)} and {_tasks(b)}; "
            "run both with the same --tasks"
        )
    parts = [f"A is {first}, of {a['created']}. B is {second}, of {b['created']}."]
    differences = _differences(a, b)
    if differences:
        parts += ["The runs differ in more than their figures:", table(["What", "A", "B"], differences)]
    parts.append(table(_COLUMNS, [_row(key, ours[key], theirs[key]) for key in shared]))
    for name, keys in (("A", ours.keys() - theirs.keys()), ("B", theirs.keys() - ours.keys())):
        if keys:
            parts.append(f"Only in {name}: " + "; ".join(f"{task}: {figure}" for task, figure, _ in sorted(keys)) + ".")
    return "\n\n".join(parts)


def _figures(results: dict) -> dict[tuple[str, str, str], dict]:
    """Figures by task, name and unit: the same name in another unit is another figure."""
    return {
        (section["task"], figure["name"], figure["unit"]): figure
        for section in results["sections"]
        for figure in section["figures"]
    }


def _tasks(results: dict) -> str:
    return ", ".join(section["task"] for section in results["sections"]) or "none"


def _differences(a: dict, b: dict) -> list[list[str]]:
    """Machine, versions and options that are not the same."""
    ours, theirs = dict(facts(a)), dict(facts(b))
    names = [name for name in {**ours, **theirs} if name not in _OF_EVERY_RUN]
    return [
        [name, ours.get(name, NONE), theirs.get(name, NONE)] for name in names if ours.get(name) != theirs.get(name)
    ]


def _row(key: tuple[str, str, str], a: dict, b: dict) -> list[str]:
    task, name, unit = key
    difference = b["value"] - a["value"]
    ratio = number(b["value"] / a["value"]) if a["value"] else NONE
    values = [number(a["value"]), interval(a), number(b["value"]), interval(b)]
    return [task, name, unit, *values, number(difference), ratio, _verdict(a, b)]


def _verdict(a: dict, b: dict) -> str:
    """The better run, if the intervals do not meet. Without intervals a difference proves nothing."""
    if a["value"] == b["value"]:
        return "equal"
    ends = [a.get("low"), a.get("high"), b.get("low"), b.get("high")]
    if None in ends:
        return "no interval"
    if a["low"] <= b["high"] and b["low"] <= a["high"]:
        return "intervals meet"
    if a.get("better") is None:
        return "apart"
    return "B is better" if (b["value"] > a["value"]) == (a["better"] == "higher") else "B is worse"
