"""The report of a run, made of its lines alone: it can be written on another machine than the one that ran."""

import dataclasses
import datetime
import shlex
from collections.abc import Iterable
from pathlib import Path

from hf_paged.errors import MissingPackageError
from hf_paged_evals.gpu.bars import MET, MISSED, NOT_MEASURED, Verdict, judge
from hf_paged_evals.gpu.plan import STAGES
from hf_paged_evals.gpu.recorder import read_lines
from hf_paged_evals.report import html, markdown
from hf_paged_evals.runner import results
from hf_paged_evals.runner.section import Figure, Plot, Section, Table

TITLE = "hf_paged on a GPU"
_SKIPPED = {"t", "stage", "kind", "tail", "error"}  # Fields that have a place of their own, or are too long for a cell.
_UNLISTED = {"end", "error", "machine", "nvidia_smi", "refused"}  # Kinds that have one.


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``results.json``.

    Without matplotlib they have no plots, and say so.

    Parameters
    ----------
    folder : Path
        Holds the lines.
    out : Path
        Exists already.

    Returns
    -------
    list of Path
        The files that a person opens.

    Raises
    ------
    ValueError
        If there are no lines, or they are none of a run.
    """
    found = collect(read_lines(folder))
    try:
        from hf_paged_evals.report.write import write
    except MissingPackageError as error:
        for section in found["sections"]:
            section["plots"] = []
        found["sections"][0]["notes"].append(f"There are no plots: {error}")
        (out / "report.md").write_text(markdown.render(found, TITLE), encoding="utf-8")
        (out / "report.html").write_text(html.render(found, {}, TITLE), encoding="utf-8")
    else:
        write(found, out, TITLE)
    results.save(found, out / results.FILE)
    return [out / "report.html", out / "report.md", out / results.FILE]


def collect(lines: list[dict]) -> dict:
    """The content of ``results.json``: what the run was on, and a section for the verdicts and for each stage."""
    begin = next((line for line in lines if line["kind"] == "begin"), {})
    surroundings = next((line for line in lines if line["kind"] == "machine"), {"machine": {}, "versions": {}})
    card = next((line for line in lines if line["kind"] == "card"), {})
    card = {f"GPU {name}": value for name, value in card.items() if name not in _SKIPPED}
    found = {
        "schema": results.SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**surroundings["machine"], **card},
        "versions": surroundings["versions"],
        "command": shlex.join(begin.get("command", ["hf-paged", "eval", "gpu"])),
        "options": {"dry": begin.get("dry"), "seconds": begin.get("seconds")},
        "sections": [dataclasses.asdict(section) for section in _sections(lines)],
    }
    results.validate(found)
    return found


def _sections(lines: list[dict]) -> Iterable[Section]:
    yield _verdict_section(lines)
    for stage in STAGES:
        mine = [line for line in lines if line["stage"] == stage.name]
        if mine:
            yield _stage_section(stage.name, stage.title, mine)


def _verdict_section(lines: list[dict]) -> Section:
    verdicts = judge(lines)
    counts = {word: sum(one.verdict == word for one in verdicts) for word in (MET, MISSED, NOT_MEASURED)}
    return Section(
        "gpu",
        f"Verdicts: {verdicts[0].card}",
        f"Of {len(verdicts)} bars {counts[MET]} are met, {counts[MISSED]} missed, {counts[NOT_MEASURED]} not measured.",
        [_figure(one) for one in verdicts if one.measured is not None],
        [
            Table(
                "Bars",
                ["Bar", "Wanted", "Measured", "Verdict", "Note"],
                [[one.bar, one.wanted, one.measured, one.verdict, one.note] for one in verdicts],
                "Medians of one run.",
            )
        ],
    )


def _figure(verdict: Verdict) -> Figure:
    return Figure(verdict.bar, float(verdict.measured), verdict.unit, better=verdict.better)


def _stage_section(name: str, title: str, lines: list[dict]) -> Section:
    """All that a stage found: a table for each kind of line, its plots, and what went wrong or was refused."""
    ends = [line for line in lines if line["kind"] == "end"]
    outcome = ends[-1]["outcome"] if ends else "its end was not recorded"
    kinds = dict.fromkeys(line["kind"] for line in lines if line["kind"] not in _UNLISTED)
    tables = [_table(kind, [line for line in lines if line["kind"] == kind]) for kind in kinds]
    notes = [f"Not measured: {line['what']}. {line['why']}" for line in lines if line["kind"] == "refused"]
    notes += [f"Error: {line['error']}" for line in lines if line["kind"] == "error"]
    notes += [f"{line['columns']}: {line['text']}" for line in lines if line["kind"] == "nvidia_smi"]
    summary = f"The stage {name}: {outcome}."
    if ends and ends[-1].get("kernels_compiled"):
        summary += f" {ends[-1]['kernels_compiled']} kernels were compiled meanwhile."
    seconds = float(ends[-1]["seconds"]) if ends else 0.0
    plots = [plot for plot in map(_PLOTS.get(name, lambda _: None), [lines]) if plot is not None]
    return Section(name, title[0].upper() + title[1:], summary, [], tables, plots, notes, _faults(lines), seconds)


def _table(kind: str, lines: list[dict]) -> Table:
    """Lines of one kind: their fields are the columns."""
    columns = list(dict.fromkeys(name for line in lines for name in line if name not in _SKIPPED))
    rows = [[_cell(line.get(name)) for name in columns] for line in lines]
    return Table(kind.replace("_", " "), columns, rows)


def _cell(value):
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_cell(inner)}" for name, inner in value.items()) or None
    if isinstance(value, list):
        return "; ".join(str(_cell(inner)) for inner in value) or None
    return value


def _faults(lines: list[dict]) -> list[str]:
    """Wrong results, a sentence each."""
    faults = [
        f"{line['op']} in {line['dtype']}, heads {line['heads']}, block {line['block']}, options {line['options']}: "
        f"an output differs by {line['error']} of the largest"
        for line in lines
        if line["kind"] == "wrong_op"
    ]
    faults += [
        f"{line['engine']}, {line['mode']}: {line['equal_rows']} of {line['rows']} rows are equal to dense"
        for line in lines
        if line["kind"] == "mode" and line["equal_rows"] != line["rows"]
    ]
    return faults


def _bars(title: str, y_label: str, lines: list[dict], group: str, value: str) -> Plot | None:
    """Bars of each engine, in groups."""
    lines = [line for line in lines if isinstance(line.get(value), int | float)]
    groups = list(dict.fromkeys(line[group] for line in lines))
    series: dict[str, list[list[float]]] = {}
    for line in lines:
        series.setdefault(line["engine"], []).append([groups.index(line[group]), line[value]])
    return Plot(title, "bar", group, y_label, series, [str(one) for one in groups]) if series else None


def _decode_plot(lines: list[dict]) -> Plot | None:
    peers = [line for line in lines if line["kind"] == "decode_peer"]
    named = [{**line, "rows x context": f"{line['rows']} x {line['context']}"} for line in peers]
    return _bars("Decode attention, one layer", "keys and values read (TB/s)", named, "rows x context", "tb_s")


def _step_plot(lines: list[dict]) -> Plot | None:
    steps = [line for line in lines if line["kind"] == "step"]
    floors = {line["rows"]: line["floor_ms"] for line in steps}
    steps += [{"engine": "floor of the memory", "rows": rows, "step_ms": floor} for rows, floor in floors.items()]
    return _bars("A decode step", "time of a step (ms)", steps, "rows", "step_ms")


def _prefill_plot(lines: list[dict]) -> Plot | None:
    named = [
        {**line, "rows x tokens, heads": f"{line['rows']} x {line['queries']}, {line['heads']}"}
        for line in lines
        if line["kind"] == "prefill" and line["queries"] == line["context"]
    ]
    return _bars("Prefill attention, whole prompts", "speed (TFLOP/s)", named, "rows x tokens, heads", "tflops")


def _generate_plot(lines: list[dict]) -> Plot | None:
    calls = [line for line in lines if line["kind"] == "generate"]
    return _bars("generate", "new tokens/s", calls, "rows", "tokens_s")


_PLOTS = {
    "decode_peers": _decode_plot,
    "model_step": _step_plot,
    "prefill": _prefill_plot,
    "generate": _generate_plot,
}
