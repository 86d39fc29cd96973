"""Values as text, the same wherever a person reads them."""

import math
from collections.abc import Iterable

NONE = "–"
TITLE = "hf_paged: dense and paged, side by side"  # Of a report whose writer names no other.


def number(value: str | float | int | bool | None) -> str:
    """A table cell: three significant digits, thousands apart, words as they are."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def interval(figure: dict) -> str:
    """A figure's 95 % interval."""
    low, high = figure.get("low"), figure.get("high")
    return NONE if low is None or high is None else f"{number(low)} to {number(high)}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{number(float(seconds))} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


def figure_rows(section: dict) -> list[list[str]]:
    """The rows of a section's table of figures."""
    return [
        [figure["name"], number(figure["value"]), figure["unit"], interval(figure), figure.get("better") or NONE]
        for figure in section["figures"]
    ]


def numeric_columns(columns: list[str], rows: list[list]) -> list[int]:
    """Columns that hold numbers only: they are set to the right."""
    return [index for index in range(len(columns)) if rows and all(_is_number(row[index]) for row in rows)]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FIGURE_COLUMNS = ["Figure", "Value", "Unit", "95 % interval", "Better"]


def conditions(results: dict) -> str:
    """Date, machine and versions of a run in one line, as they stand beside its figures."""
    machine, versions = results["machine"], results["versions"]
    return ", ".join(
        [
            f"{results['created'][:10]}, {machine['processor']}, threads: {machine['threads']}",
            f"CPU kernels {machine['CPU kernels']}",
            *(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions),
        ]
    )


def facts(results: dict) -> Iterable[tuple[str, str]]:
    """Name and value of all that the run depended on: date, machine, versions, options, the command that repeats it."""
    yield "Date", str(results["created"])
    yield from _flat("Machine", results["machine"])
    yield from _flat("Version", results["versions"])
    yield from _flat("Option", results["options"])
    yield "Command", results["command"]


def _flat(title: str, value) -> Iterable[tuple[str, str]]:
    """``title: key`` and value of a dict and the dicts inside it; absent values are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{title}: {key}", inner)
    elif isinstance(value, (list, tuple)):
        if value:
            yield title, ", ".join(map(number, value))
    elif value is not None:
        yield title, number(value) if isinstance(value, bool) else str(value)
