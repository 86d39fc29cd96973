"""The report: what it says comes from the results, and the page needs nothing else."""

import base64
import re
from html.parser import HTMLParser

import matplotlib.colors
import numpy
import pytest

from hf_paged_evals.report import plots
from hf_paged_evals.report.text import interval, number
from hf_paged_evals.report.write import write
from support import reports


class Page(HTMLParser):
    """Cells of tables, references, tags, descriptions of pictures, and words."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.references, self.tags, self.alts, self.words = [], [], set(), [], []
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.alts += [value for name, value in attributes if name == "alt"]
        if tag == "td":
            self._cell = []

    def handle_data(self, data):
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag):
        if tag == "td":
            self.cells.append("".join(self._cell))
            self._cell = None


@pytest.fixture
def written(tmp_path):
    """Results, the page and the Markdown made of them, and their folder."""
    results = reports.results()
    write(results, tmp_path)
    return results, Page((tmp_path / "report.html").read_text()), (tmp_path / "report.md").read_text(), tmp_path


def leaves(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_the_page_needs_nothing_from_elsewhere(written):
    _, page, _, folder = written
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    pictures = [reference for reference in page.references if not reference.startswith("#")]
    assert len(pictures) == 3 and all(reference.startswith("data:image/svg+xml;base64,") for reference in pictures)
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style
    for picture in pictures:
        svg = base64.b64decode(picture.partition(",")[2]).decode()
        assert all(reference.startswith(("#", "data:")) for reference in re.findall(r'href="([^"]*)"', svg))
        assert not re.findall(r"url\((?!#)", svg)


def test_every_cell_comes_from_the_results(written):
    results, page, _, _ = written
    known = {number(leaf) for leaf in leaves(results)} | {str(leaf) for leaf in leaves(results)}
    known |= {interval(figure) for section in results["sections"] for figure in section["figures"]}
    titles = {"Date", "Command"} | {
        f"{title}: {key}"
        for title, part in (("Machine", "machine"), ("Version", "versions"), ("Option", "options"))
        for key in results[part]
    }
    known |= titles | {", ".join(results["options"]["tasks"])}
    assert page.cells and set(page.cells) <= known
    for section in results["sections"]:
        for figure in section["figures"]:
            assert number(figure["value"]) in page.cells


def test_a_changed_result_changes_page_and_markdown(written):
    results, page, markdown, folder = written
    results["sections"][0]["figures"][0]["value"] = 7654.25
    write(results, folder)
    assert "7,654" not in page.cells and "7,654" not in markdown
    assert "7,654" in Page((folder / "report.html").read_text()).cells
    assert "| paged | 7,654 | tokens/s |" in (folder / "report.md").read_text()


def test_equal_results_give_equal_files(written, tmp_path_factory):
    results, _, _, folder = written
    again = tmp_path_factory.mktemp("again")
    write(results, again)
    names = ["report.html", "report.md", *(f"plots/{path.name}" for path in (folder / "plots").iterdir())]
    assert len(names) == 5
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_markup_in_results_stays_text(written):
    _, page, markdown, _ = written
    assert "fast" not in page.tags and "A <fast> one" in page.cells and "dense & <plain>" in page.cells
    assert "| dense &amp; &lt;plain> | 32 |" in markdown and "**Each | contender**" in markdown


def test_the_run_is_told(written):
    _, page, markdown, _ = written
    for words in ("2026-11-23T18:00:00", "hf-paged eval --quick --out OUT", "A <fast> one", "5.23.0", "float32"):
        assert words in page.cells
    assert "| Option: seed | 7 |" in markdown


def test_flags_are_said_where_the_section_is_named_and_in_it(written):
    _, page, markdown, _ = written
    assert page.words.count("Wrong: two rows differ") == 2 and markdown.count("**Wrong: two rows differ**") == 2


def test_markdown_names_the_plots_that_are_there(written):
    _, _, markdown, folder = written
    named = re.findall(r"\]\((plots/[^)]*)\)", markdown)
    assert len(named) == 3 and all((folder / name).read_text().startswith("<?xml") for name in named)


def every_plot():
    return [plot for section in reports.results()["sections"] for plot in section["plots"]]


@pytest.mark.parametrize("plot", every_plot(), ids=lambda plot: plot["kind"])
def test_axes_are_labelled_and_pictures_described(plot, written):
    axes = plots.drawing(plot).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch (rows)", "rate (tokens/s)")
    assert axes.get_title(loc="left") == plot["title"]
    assert f"{plot['title']}: rate (tokens/s) against batch (rows)" in written[1].alts


def test_paged_looks_the_same_whoever_stands_beside_it():
    colours = set()
    for labels in (["dense", "paged"], ["dense, batch 1", "dense, batch 8", "paged"], ["paged, batch 8"]):
        series = {label: [[0, 1.0], [1, 2.0]] for label in labels}
        lines = plots.drawing(reports.plot("Some", "line", series)).axes[0].get_lines()
        assert len({line.get_color() for line in lines}) == len(labels)
        colours |= {line.get_color() for line in lines if line.get_label().startswith("paged")}
    assert len(colours) == 1


def test_lines_hold_the_results():
    plot = every_plot()[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in plots.drawing(plot).axes[0].get_lines()}
    assert drawn == plot["series"]


def test_values_far_apart_get_a_logarithmic_axis_that_says_so():
    plot = reports.plot("Latency", "line", {"paged": [[1, 0.01], [2, 30.0]]})
    axes = plots.drawing(plot).axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "rate (tokens/s) (logarithmic)"
    near = plots.drawing(reports.plot("Latency", "line", {"paged": [[1, 10.0], [2, 30.0]]})).axes[0]
    assert near.get_yscale() == "linear" and near.get_ylim()[0] == 0


def test_heat_map_names_its_cells_and_its_colours():
    drawn = plots.drawing(every_plot()[2])
    axes, bar = drawn.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "2k", "4k"]
    assert [text.get_text() for text in axes.texts] == ["100", "50", "0", "100", "100", "25"]
    assert bar.get_ylabel() == "found (%)"


# How colours look to eyes without red, green or blue cones (Machado, Oliveira and Fernandes, 2009), in linear RGB.
BLINDNESS = {
    "none": numpy.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_lines_can_be_told_apart(blindness):
    names = ["dense", "paged", *(f"line {index}" for index in range(5))]
    series = {name: [[0, index + 1.0], [1, index + 2.0]] for index, name in enumerate(names)}
    lines = plots.drawing(reports.plot("Many", "line", series)).axes[0].get_lines()
    seen = [look(line.get_color(), blindness) for line in lines]
    assert min(numpy.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 0.1
    assert numpy.linalg.norm(seen[0] - seen[1]) > 0.4, "dense and paged, in most plots"
    assert len({line.get_marker() for line in lines}) == 7


def look(colour, blindness):
    """A colour as sRGB that others see as that eye sees it."""
    rgb = numpy.array(matplotlib.colors.to_rgb(colour))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = numpy.clip(numpy.array(BLINDNESS[blindness]) @ linear, 0, 1)
    return numpy.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'pie'"):
        plots.draw(reports.plot("Odd", "pie", {}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234, "1,234"),
        (1234.5, "1,234"),
        (99.95, "100.0"),
        (27.125, "27.1"),
        (0.04567, "0.0457"),
        (0.0000213, "2.13e-05"),
        (0.0, "0"),
        (-3.456, "-3.46"),
        (True, "yes"),
        (None, "–"),
        ("words", "words"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text
