"""The report as Markdown."""

from hf_paged_evals.report import plot_names
from hf_paged_evals.report.text import FIGURE_COLUMNS, TITLE, duration, facts, figure_rows, number, numeric_columns


def render(results: dict, title: str = TITLE) -> str:
    """The whole report. Plots are files in ``plots/`` beside it."""
    sections = results["sections"]
    parts = [
        f"# {title}",
        "\n".join(f"- **{section['title']}.** {section['summary']}{_flags(section)}" for section in sections),
    ]
    parts += [_section(section, index) for index, section in enumerate(sections)]
    parts += ["## The run", table(["What", "Value"], list(facts(results)))]
    return "\n\n".join(parts) + "\n"


def _section(section: dict, index: int) -> str:
    parts = [f"## {section['title']}", section["summary"] + _flags(section)]
    if section["figures"]:
        parts.append(table(FIGURE_COLUMNS, figure_rows(section)))
    for place, plot in enumerate(section["plots"]):
        name = plot_names.name(section, index, place)
        parts.append(f"![{_cell(plot_names.description(plot))}](plots/{name}.svg)")
    for one in section["tables"]:
        parts += [f"**{one['title']}**", table(one["columns"], one["rows"])]
        if one.get("note"):
            parts.append(one["note"])
    if section["notes"]:
        parts.append("\n".join(f"- {note}" for note in section["notes"]))
    parts.append(f"Took {duration(section['seconds'])}.")
    return "\n\n".join(parts)


def _flags(section: dict) -> str:
    return "".join(f" **Wrong: {flag}**" for flag in section["flags"])


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table; columns of numbers only are set to the right."""
    lines = [[_cell(cell) for cell in row] for row in (columns, *rows)]
    numeric = numeric_columns(columns, rows)
    rule = ["---:" if index in numeric else "---" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _cell(value) -> str:
    return number(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
