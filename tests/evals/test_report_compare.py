"""Two runs side by side."""

import json

import pytest

from hf_paged_evals.report.compare import compare
from support import reports


def saved(folder, results):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs that differ in every figure, an option and a version."""
    second = reports.results()
    paged, ratio, peak = second["sections"][0]["figures"]
    paged["value"], peak["value"] = 279.5, 613.0
    ratio.update(value=6.5, low=6.25, high=6.75)
    second["options"]["dtype"], second["versions"]["torch"] = "bfloat16", "2.14.0"
    second["sections"][1]["figures"] = [reports.figure("found", 90.0, "%")]
    return saved(tmp_path / "a", reports.results()), saved(tmp_path / "b", second)


def row(text, name):
    return next(line for line in text.splitlines() if f"| {name} |" in line)


def test_figures_stand_side_by_side(runs):
    text = compare(*runs)
    assert row(text, "paged").endswith("| 140 | – | 280 | – | 140 | 2.00 | no interval |")
    assert row(text, "ratio").endswith("| 5.15 | 4.75 to 5.50 | 6.50 | 6.25 to 6.75 | 1.35 | 1.26 | B is better |")
    assert row(text, "peak").endswith("| 0 | 1.00 | equal |")
    assert "Only in B: needle: found." in text and "Only in A" not in text


def test_what_else_differs_is_said(runs):
    text = compare(*runs)
    assert "| Option: dtype | float32 | bfloat16 |" in text and "| Version: torch | 2.13.0 | 2.14.0 |" in text
    assert "Machine" not in text and "| Option: seed" not in text


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (5.4, 7.6, "higher", "intervals meet"),
        (6.0, 7.0, "higher", "B is better"),
        (6.0, 7.0, "lower", "B is worse"),
        (6.0, 7.0, None, "apart"),
    ],
)
def test_verdicts_need_intervals_that_do_not_meet(tmp_path, low, high, better, verdict):
    second = reports.results()
    second["sections"][0]["figures"][1].update(value=6.5, low=low, high=high)
    first = reports.results()
    for results in (first, second):
        results["sections"][0]["figures"][1]["better"] = better
    assert row(compare(saved(tmp_path / "a", first), saved(tmp_path / "b", second)), "ratio").endswith(f"| {verdict} |")


def test_the_same_run_is_equal_everywhere(runs):
    text = compare(runs[0], runs[0] / "results.json")
    assert text.count("| equal |") == 3 and "differ" not in text and "Only in" not in text


def test_another_schema_is_refused(tmp_path, runs):
    other = reports.results()
    other["schema"] = 2
    with pytest.raises(ValueError, match="schema 2, this version reads 1"):
        compare(runs[0], saved(tmp_path / "c", other))


def test_a_missing_run_is_refused(tmp_path, runs):
    with pytest.raises(ValueError, match="no results at"):
        compare(runs[0], tmp_path / "nowhere")


def test_runs_with_nothing_in_common_are_refused(tmp_path, runs):
    other = reports.results()
    other["sections"] = [reports.section("latency", figures=[reports.figure("TTFT", 1.0, "s", better="lower")])]
    with pytest.raises(ValueError, match="their tasks are throughput, needle and latency"):
        compare(runs[0], saved(tmp_path / "c", other))


def test_the_same_name_in_another_unit_is_another_figure(tmp_path, runs):
    other = reports.results()
    other["sections"][0]["figures"][0]["unit"] = "requests/s"
    text = compare(runs[0], saved(tmp_path / "c", other))
    assert "Only in A: throughput: paged." in text and "Only in B: throughput: paged." in text
