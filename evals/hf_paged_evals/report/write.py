"""Writes the files of a report."""

from pathlib import Path

from hf_paged_evals.report import html, markdown, plot_names, plots
from hf_paged_evals.report.text import TITLE


def write(results: dict, folder: Path, title: str = TITLE) -> None:
    """Write ``report.md``, ``report.html`` and ``plots/*.svg``.

    The Markdown refers to the plots; the page holds them.

    Parameters
    ----------
    results : dict
        The content of results.json, checked by `hf_paged_evals.runner.results`.
    folder : Path
        Exists already. Files of an earlier report are replaced.
    title : str
    """
    drawn = {name: plots.draw(plot) for name, plot in plot_names.by_name(results).items()}
    (folder / "plots").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        (folder / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
    (folder / "report.md").write_text(markdown.render(results, title), encoding="utf-8")
    (folder / "report.html").write_text(html.render(results, drawn, title), encoding="utf-8")
