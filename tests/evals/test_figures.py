"""The published figures: the pages show the committed results, and one command measures and rewrites them."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from hf_paged.cli import main
from hf_paged.errors import PagedError
from hf_paged_evals.command import main as evaluate
from hf_paged_evals.figures import command, pages, rows, tables
from hf_paged_evals.figures.pages import Checkout
from hf_paged_evals.figures.parts import PARTS, parts_named
from hf_paged_evals.report.text import number
from hf_paged_evals.runner import results, run
from hf_paged_evals.runner.script import Script
from support import reports, tiny_eval

ROOT = Path(__file__).resolve().parents[2]
PART_OF_ROWS = {row.part for row in (*rows.README, *rows.BENCHMARKS)}
README_PARTS = [row.part for row in rows.README]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    """A copy of the pages and the results."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    for page in (pages.BENCHMARKS, pages.MODELS):
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / pages.RESULTS, tmp_path / pages.RESULTS)
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, and texts enough for batches of 32."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "texts.txt").write_text("\n".join(tiny_eval.TEXT[at:][: 9 + at % 40] for at in range(70)))
    return ["--model", tiny_eval.save_model(folder / "model"), "--dataset", str(folder / "texts.txt")]


def trial(checkout: Checkout, files, *words, work) -> list[str]:
    return ["eval", "figures", "--quick", *files, "--checkout", str(checkout.root), "--work", str(work), *words]


def run_here(words: list[str]) -> int:
    """A part's run in this process: another one would import torch again."""
    return evaluate(words)


def row(text: str, what: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_pages_show_the_committed_results():
    own = pages.own_checkout()
    assert own == Checkout(ROOT)
    for page, text in own.rewritten().items():
        assert page.read_text(encoding="utf-8") == text, "run hf-paged eval figures --tables"


def test_every_row_has_a_part_and_every_part_is_shown():
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    assert PART_OF_ROWS | set(rows.WHOLE_RUNS) | {rows.MODEL_TYPES} == set(names)
    for table in (rows.README, rows.BENCHMARKS):
        assert len({one.what for one in table}) == len(table)


def test_figures_in_the_prose_of_the_readme_are_those_of_the_run():
    sections = results.load(ROOT / pages.RESULTS / "accuracy-bfloat16.json")["sections"]
    figures = {figure["name"]: figure for section in sections for figure in section["figures"]}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{number(figures['rows equal']['value'])} % of the rows are equal to the last token" in text
    assert figures["divergences that rounding does not explain"]["value"] == 0
    for name in ("sdpa", "paged"):
        assert f"perplexity ({number(figures[f'perplexity, {name}']['value'])})" in text
        assert f"HumanEval pass@1 ({number(figures[f'pass@1, {name}']['value'])} %)" in text


def test_parts_are_named_with_or_without_their_dtype():
    assert [part.name for part in parts_named(["throughput"])] == ["throughput-bfloat16", "throughput-float32"]
    assert [part.name for part in parts_named(["scheduler", "threads-float32"])] == ["threads-float32", "scheduler"]
    with pytest.raises(ValueError, match="no part is called through: there are throughput-bfloat16, "):
        parts_named(["through"])


def test_the_list_names_every_command(capsys):
    assert main.main(["eval", "figures", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in PARTS]
    assert all(" hf-paged eval " in line for line in lines)


def test_a_trial_measures_and_rewrites_a_copy_of_the_pages(checkout, files, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_in_a_process", run_here)
    before = {page: page.read_text() for page in checkout.rewritten()}
    words = trial(checkout, files, "--only", *README_PARTS, work=tmp_path / "work")
    assert main.main(words) == 0
    readme, benchmarks = ((checkout.root / page).read_text() for page in (pages.README, pages.BENCHMARKS))
    found = results.load(checkout.results / "throughput-bfloat16.json")
    figures = {figure["name"]: figure["value"] for figure in found["sections"][0]["figures"]}
    what, paged, dense, measured = row(readme, rows.README[0].what)
    assert paged == f"{number(figures['ragged: paged, batch 32'])} tokens/s"
    assert dense.startswith(f"{number(figures['ragged: dense, batch 32'])} in one batch of 32, ")
    assert measured.startswith(found["created"][:10])
    for one in rows.README:
        assert row(readme, one.what) != row(before[checkout.root / pages.README], one.what)
    shown = {one.what for one in rows.BENCHMARKS if one.part in README_PARTS}
    for one in rows.BENCHMARKS:
        old = row(before[checkout.root / pages.BENCHMARKS], one.what)
        assert (row(benchmarks, one.what) != old) == (one.what in shown), one.what
    assert not list((tmp_path / "work").iterdir()), "finished runs leave nothing to go on with"
    assert checkout.rewrite() == []


def test_figures_of_a_trial_are_not_published(capsys, files):
    for words in (["--quick"], files[:2], files[2:], ["--quick", "--checkout", str(ROOT)]):
        assert main.main(["eval", "figures", *words]) == 1
        assert "are not published" in capsys.readouterr().err


def test_without_a_checkout_one_must_be_named(capsys, monkeypatch):
    monkeypatch.setattr(command, "own_checkout", lambda: None)
    assert main.main(["eval", "figures", "--tables"]) == 1
    assert "name a checkout with --checkout DIR" in capsys.readouterr().err


def given(tmp_path, *words):
    return command._parser().parse_args(["--work", str(tmp_path / "work"), *words])


def test_a_run_that_fails_leaves_the_old_results(checkout, tmp_path):
    kept = (checkout.results / "needle-float32.json").read_bytes()
    (part,) = parts_named(["needle-float32"])
    with pytest.raises(PagedError, match="needle-float32 ended with 3 and left no results"):
        command.measure(part, given(tmp_path), checkout.results, lambda words: 3)
    assert (checkout.results / "needle-float32.json").read_bytes() == kept


def test_an_interrupted_report_goes_on_in_its_folder_and_a_finished_one_starts_anew(checkout, tmp_path):
    (part,) = parts_named(["needle-float32"])
    folders = []

    def interrupted(words):
        folders.append(Path(words[words.index("--out") + 1]))
        (folders[-1] / "samples").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    def finished(words):
        assert Path(words[-1]) == folders[0] and (folders[0] / "samples").exists()
        (folders[0] / results.FILE).write_text(json.dumps(reports.results()))
        return 0

    with pytest.raises(KeyboardInterrupt):
        command.measure(part, given(tmp_path), checkout.results, interrupted)
    command.measure(part, given(tmp_path), checkout.results, finished)
    assert not folders[0].exists()
    assert results.load(checkout.results / "needle-float32.json") == reports.results()


class StopError(Exception):
    """Raised in place of a measurement."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_words_of_a_part_are_understood(part, tmp_path, monkeypatch):
    """Every part's command line is parsed, for a measurement and for a trial, up to where it would run."""
    parsed, parse = [], Script._parse

    def stop(*found):
        parsed.append(found)
        raise StopError

    monkeypatch.setattr(run, "run_tasks", stop)
    monkeypatch.setattr(Script, "_parse", lambda self, argv: stop(parse(self, argv)))
    for words in ([], ["--quick", "--model", "here", "--dataset", "there"]):
        with pytest.raises(StopError):
            evaluate([*command.words_of(part, given(tmp_path, *words)), "--out", str(tmp_path)])
    if part.is_report:
        for options, tasks in parsed:
            assert all(options.settings_of(task) for task in tasks)
    assert len(parsed) == 2


def changed(found: dict, **figures) -> dict:
    """Results with these figures in their first section."""
    found = copy.deepcopy(found)
    found["sections"][0]["figures"] = [reports.figure(name, value) for name, value in figures.items()]
    found["machine"] |= {"processor": "One", "threads": 3}
    return found


def test_a_row_takes_its_values_from_the_results(tmp_path):
    found = changed(reports.results(), **{"a, b: c": 1.5, "a, d: c": 2.25, "plain": 3000})
    assert tables.filled("<plain> s, <a, *: c>; <a, b: c>", found) == "3,000 s, 1.50 to 2.25; 1.50"
    with pytest.raises(ValueError, match="have no figure 'e': measure the part again"):
        tables.filled("<e>", found)
    (tmp_path / "part.json").write_text(json.dumps(found))
    line = tables._line(rows.Row("what", "part", ("<plain>",)), "", tmp_path, ["what", "`part`"])
    assert line == "| what | `part` | 3,000 | 2026-11-23, One, threads: 3 |"


def test_a_row_without_results_stays_as_it_is_or_is_missed(tmp_path):
    one = rows.Row("what", "part", ("<plain>",))
    old = "| what else | 4 |\n| what | 5 | by hand |"
    assert tables._line(one, old, tmp_path, ["what"]) == "| what | 5 | by hand |"
    with pytest.raises(ValueError, match="part has no results: measure that part"):
        tables._line(one, "| what else | 4 |", tmp_path, ["what"])


def test_the_table_of_model_types_comes_from_its_run(tmp_path):
    assert tables.model_types_table("as it was", tmp_path) == "as it was"
    out = str(tmp_path / "model-types.json")
    assert main.main(["eval", "model-types", "--types", "llama", "bloom", "--out", out]) == 0
    text = tables.model_types_table("as it was", tmp_path)
    assert "| pages (1) | every layer with a KV cache reads pages | llama |" in text
    assert "| gather (1) | the model computes with its keys and values | bloom |" in text


def test_a_whole_run_has_date_machine_command_and_figures():
    found = reports.results()
    found["machine"]["CPU kernels"] = "avx2"
    text = tables._whole_run(found)
    for words in ("2026-11-23", "A <fast> one", "`hf-paged eval --quick --out DIR`", "5.15 x (4.75 to 5.50)"):
        assert words in text


def test_only_what_lies_between_the_marks_is_replaced():
    text = pages.with_table("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n", "speed", "new")
    assert text == "before\n<!-- speed -->\nnew\n<!-- /speed -->\nafter\n"
    assert pages.table_in(text, "speed") == "new"


@pytest.mark.parametrize("text", ["none", "<!-- speed --> only one", "<!-- /speed --> turned <!-- speed -->"])
def test_a_page_without_marks_is_refused(text):
    with pytest.raises(ValueError, match="must hold <!-- speed -->"):
        pages.with_table(text, "speed", "new")
