"""Plots as SVG: the same text for the same numbers, colours that colour-blind eyes tell apart."""

import io
import itertools
from collections.abc import Iterator

import numpy

from hf_paged.errors import MissingPackageError

try:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing
except ModuleNotFoundError as error:
    raise MissingPackageError("matplotlib", "hf-paged[evals]") from error

# Okabe and Ito's palette, darkest first, without its yellow, which is pale on white. Lines differ in their
# markers and dashes too: they are told apart in grey as well.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "hf_paged",  # Otherwise the ids in the file change from run to run.
}
_OURS = 1  # The place in these lists that is kept for "paged": it looks the same in every plot.
_SIZE = (6.2, 4.0)  # inches: ten-point letters stay readable when a narrow window halves the picture.
_FAR = 50.0  # Values this many times apart are drawn on a logarithmic axis.
_MANY = 25  # Points after which markers would hide the line.
_CELLS = 150  # Cells of a heat map that still have room for their values.


def draw(plot: dict) -> str:
    """The plot as SVG. Raises as `drawing` does."""
    with matplotlib.rc_context(_SETTINGS):
        out = io.StringIO()
        drawing(plot).savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def drawing(plot: dict) -> Drawing:
    """The plot before it is SVG.

    Raises
    ------
    ValueError
        If its kind is none of "line", "bar" and "heatmap".
    """
    if plot["kind"] not in _KINDS:
        raise ValueError(f'a plot is of kind "line", "bar" or "heatmap"; {plot["title"]!r} is {plot["kind"]!r}')
    with matplotlib.rc_context(_SETTINGS):
        made = Drawing(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(made)
        axes = made.add_subplot()
        _KINDS[plot["kind"]](axes, plot)
        axes.set_title(plot["title"], loc="left")
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot["y_label"] + (" (logarithmic)" if axes.get_yscale() == "log" else ""))
    return made


def _line(axes, plot: dict) -> None:
    for index, label, points in _placed(plot):
        x, y = zip(*points) if points else ((), ())
        style = {"color": _pick(_COLOURS, index), "linestyle": _pick(_DASHES, index), "label": label}
        marker = _pick(_MARKERS, index) if len(points) <= _MANY else None
        axes.plot(x, y, marker=marker, linewidth=1.8, markersize=6, **style)
    _ticks(axes, plot)
    _scale(axes, [y for points in plot["series"].values() for _, y in points])
    _legend(axes, plot)


def _bar(axes, plot: dict) -> None:
    count = len(plot["series"])
    width = 0.8 / max(count, 1)
    for number, (index, label, points) in enumerate(_placed(plot)):
        places = [x + (number - (count - 1) / 2) * width for x, _ in points]
        hatch = ["", "//", "..", "xx", "\\\\", "++", "oo"]
        bars = axes.bar(
            places,
            [y for _, y in points],
            width,
            label=label,
            color=_pick(_COLOURS, index),
            hatch=_pick(hatch, index),
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=1)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.1)
    _ticks(axes, plot)
    _legend(axes, plot)


def _heatmap(axes, plot: dict) -> None:
    ((label, rows),) = plot["series"].items()
    values = numpy.array(rows, dtype=float)
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=min(0.0, numpy.nanmin(values)))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for set_ticks, labels, count in (
        (axes.set_xticks, plot.get("x_ticks") or (), values.shape[1]),
        (axes.set_yticks, plot.get("y_ticks") or (), values.shape[0]),
    ):
        set_ticks(range(count), labels or range(count))
    if values.size <= _CELLS:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for (row, column), value in numpy.ndenumerate(values):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=plot["title"] if label == "values" else label)


_KINDS = {"line": _line, "bar": _bar, "heatmap": _heatmap}


def _placed(plot: dict) -> Iterator[tuple[int, str, list]]:
    """Place in the lists of colours, label and points of each series."""
    free = itertools.chain((place for place in range(len(_COLOURS)) if place != _OURS), itertools.count(len(_COLOURS)))
    taken = False
    for label, points in plot["series"].items():
        is_ours = label.startswith("paged") and not taken
        taken = taken or is_ours
        yield (_OURS if is_ours else next(free)), label, points


def _pick(choices: list, index: int):
    return choices[index % len(choices)]


def _ticks(axes, plot: dict) -> None:
    labels = plot.get("x_ticks") or ()
    if labels:
        rotation = 20 if sum(map(len, labels)) > 60 else 0
        axes.set_xticks(range(len(labels)), labels, rotation=rotation, ha="right" if rotation else "center")


def _scale(axes, values: list[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > _FAR:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, *values) if values else 0)


def _legend(axes, plot: dict) -> None:
    if len(plot["series"]) > 1:
        columns = 2 if len(plot["series"]) > 3 else len(plot["series"])
        axes.figure.legend(loc="outside lower center", ncols=columns)
