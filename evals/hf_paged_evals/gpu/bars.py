"""The bars, and whether a run meets them: every bar is met, missed, or not measured for a reason that is stated."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_paged_evals.gpu.stages import generate, sanitizers
from hf_paged_evals.report.markdown import table
from hf_paged_evals.report.text import NONE, number

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
_OURS = ("paged captured", "paged eager")  # The first that a run has counts, unless a bar is of captured steps.
_HEADS = {"heads": "32/8x128", "block": 16, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Measured:
    """The verdict of a run on a bar.

    Attributes
    ----------
    value : float or None
        None: nothing.
    note : str
        What a reader should know of the value, or why there is none.
    """

    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A number that a run should reach.

    Attributes
    ----------
    name : str
    limit : float
    is_least : bool
        The value should be at least the limit; else at most.
    unit : str
        Of both.
    stages : tuple of str
        Those that measure it.
    measure : callable
        Reads the value out of the lines of a run.
    """

    name: str
    limit: float
    is_least: bool
    unit: str
    stages: tuple[str, ...]
    measure: Callable[[list[dict]], Measured]

    def is_met(self, value: float) -> bool:
        """Tell whether a value reaches the limit."""
        return (operator.ge if self.is_least else operator.le)(value, self.limit)

    def __str__(self) -> str:
        return f"at {'least' if self.is_least else 'most'} {self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Verdict:
    """A bar held against one run; JSON-able by ``vars``.

    Attributes
    ----------
    card : str
        The device's name.
    bar, wanted : str
    measured : float or None
    unit, verdict, note : str
    better : str
        ``"higher"`` or ``"lower"``.
    """

    card: str
    bar: str
    wanted: str
    measured: float | None
    unit: str
    verdict: str
    note: str
    better: str


def judge(lines: list[dict]) -> list[Verdict]:
    """Hold every bar against the lines of a run. A dry run measures nothing."""
    begin = next((line for line in lines if line["kind"] == "begin"), {})
    card = next((line["name"] for line in lines if line["kind"] == "card"), begin.get("card", "unknown card"))
    verdicts = []
    for bar in BARS:
        found = Measured(None, "a dry run measures nothing") if begin.get("dry") else bar.measure(lines)
        if found.value is None:
            verdict, note = NOT_MEASURED, found.note or _why_not(lines, bar.stages)
        else:
            verdict, note = MET if bar.is_met(found.value) else MISSED, found.note
        better = "higher" if bar.is_least else "lower"
        verdicts.append(Verdict(card, bar.name, str(bar), found.value, bar.unit, verdict, note, better))
    return verdicts


def describe(verdicts: list[Verdict]) -> str:
    """The verdicts as a terminal shows them."""
    rows = [[one.bar, one.wanted, NONE if one.measured is None else number(one.measured), one.verdict, one.note]
            for one in verdicts]  # fmt: skip
    counts = ", ".join(f"{sum(one.verdict == word for one in verdicts)} {word}" for word in (MET, MISSED, NOT_MEASURED))
    card = verdicts[0].card
    return f"{card}: {counts}\n\n{table(['Bar', 'Wanted', 'Measured', 'Verdict', 'Note'], rows)}"


def _why_not(lines: list[dict], stages: tuple[str, ...]) -> str:
    """The reason that the stages of a bar give for the lack of its value."""
    reasons = []
    for stage in stages:
        mine = [line for line in lines if line["stage"] == stage]
        ends = [line["outcome"] for line in mine if line["kind"] == "end"]
        if not ends:
            reasons.append(f"{stage} was not run")
        elif ends[0] != "done":
            reasons.append(f"{stage}: {ends[0]}")
        else:
            reasons += [f"{line['what']}: {line['why']}" for line in mine if line["kind"] == "refused"][:2]
    return "; ".join(reasons) or f"{', '.join(stages)} ended without it"


def _pick(lines: Iterable[dict], kind: str, **fields) -> dict | None:
    """The last line of a kind with these fields."""
    found = [line for line in lines if line["kind"] == kind and fields.items() <= _hashable(line).items()]
    return found[-1] if found else None


def _hashable(line: dict) -> dict:
    return {name: value for name, value in line.items() if not isinstance(value, dict | list)}


def _decode_share(rows: int, context: int) -> Callable[[list[dict]], Measured]:
    def measure(lines: list[dict]) -> Measured:
        line = _pick(lines, "decode", engine="paged", rows=rows, context=context, **_HEADS)
        if line is None:
            return Measured(None)
        return Measured(100 * line["of_copy"], f"{number(line['tb_s'])} TB/s")

    return measure


def _decode_beside_peers(rows: int, context: int) -> Callable[[list[dict]], Measured]:
    """The bar is of xformers and of torch's own; others are shown, and count for nothing here."""

    def measure(lines: list[dict]) -> Measured:
        size = {"rows": rows, "context": context, **_HEADS}
        ours = _pick(lines, "decode_peer", engine="paged", **size)
        peers = [
            line
            for line in lines
            if line["kind"] == "decode_peer"
            and size.items() <= _hashable(line).items()
            and line["engine"].startswith(("sdpa", "xformers"))
        ]
        if ours is None or not peers:
            return Measured(None)
        best = max(peers, key=lambda line: line["tb_s"])
        return Measured(100 * ours["tb_s"] / best["tb_s"], f"the best is {best['engine']}, {number(best['tb_s'])} TB/s")

    return measure


def _prefill(lines: list[dict]) -> Measured:
    line = _pick(lines, "prefill", engine="paged", rows=1, queries=8192, context=8192, heads=_HEADS["heads"])
    if line is None:
        return Measured(None)
    peers = [one for one in lines if one["kind"] == "prefill" and one["engine"] != "paged"]
    peers = [one for one in peers if (one["rows"], one["queries"], one["heads"]) == (1, 8192, _HEADS["heads"])]
    return Measured(line["tflops"], "; ".join(f"{one['engine']} {number(one['tflops'])}" for one in peers))


def _over_floor(lines: list[dict]) -> Measured:
    line = _pick(lines, "step", engine="paged captured", rows=32)
    if line is None or not _is_replayed(line):
        return Measured(None, _not_replayed(line))
    card = _pick(lines, "card") or {}
    note = f"{number(line['step_ms'])} ms; floor {number(line['floor_ms'])} ms at {number(line['copy_tb_s'])} TB/s"
    if "sheet_tb_s" in card:
        sheet = line["floor_ms"] * line["copy_tb_s"] / card["sheet_tb_s"]
        note += f"; {number(line['step_ms'] / sheet)} x the floor at the data sheet's {number(card['sheet_tb_s'])} TB/s"
    return Measured(line["over_floor"], note)


def _is_replayed(step: dict) -> bool:
    """Tell whether the steps that were to be captured were."""
    return bool(step.get("counters", {}).get("replayed_steps"))


def _not_replayed(step: dict | None) -> str:
    """Why a step does not count as captured; nothing where there is none."""
    if step is None:
        return ""
    reasons = step.get("counters", {}).get("eager_steps") or {}
    words = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"no step was replayed: {words or 'the statistics give no reason'}"


def _step_gain(rows: int) -> Callable[[list[dict]], Measured]:
    def measure(lines: list[dict]) -> Measured:
        ours = _pick(lines, "step", engine="paged captured", rows=rows)
        dense = _pick(lines, "step", engine="dense eager", rows=rows)
        if ours is None or dense is None or not _is_replayed(ours):
            return Measured(None, _not_replayed(ours))
        note = f"{number(ours['step_ms'])} ms, dense {number(dense['step_ms'])} ms"
        return Measured(dense["step_ms"] / ours["step_ms"], note)

    return measure


def _generate_gain(peer: str) -> Callable[[list[dict]], Measured]:
    def measure(lines: list[dict]) -> Measured:
        found = (_pick(lines, "generate", engine=engine, rows=generate.ROWS) for engine in _OURS)
        ours = next((line for line in found if line is not None), None)
        theirs = _pick(lines, "generate", engine=peer, rows=generate.ROWS)
        if ours is None or theirs is None:
            return Measured(None)
        note = f"{ours['engine']} {number(ours['tokens_s'])} tokens/s, {peer} {number(theirs['tokens_s'])}"
        note += f" ({theirs['note']})" if "note" in theirs else ""
        return Measured(ours["tokens_s"] / theirs["tokens_s"], note)

    return measure


def _wrong_ops(lines: list[dict]) -> Measured:
    """Counts only what the stage came to the end of."""
    total, replays = _pick(lines, "op_accuracy"), [line for line in lines if line["kind"] == "padded_replay"]
    if total is None or not replays or not _is_done(lines, "op_accuracy"):
        return Measured(None)
    wrong = total["wrong"] + sum(not line["right"] for line in lines if line["kind"] == "moves_bits")
    needed = ("right", "padding_gives_zeros", "padding_writes_nothing")
    wrong += sum(not all(line[name] for name in needed) for line in replays)
    return Measured(wrong, f"of {total['cases']} cases and {len(replays)} padded replays")


def _unequal_modes(lines: list[dict]) -> Measured:
    """One unequal row is enough to miss the bar; to meet it, every mode must have been tried."""
    modes = [line for line in lines if line["kind"] == "mode"]
    unequal = [line for line in modes if line["equal_rows"] != line["rows"]]
    if not modes or not (unequal or _is_done(lines, "equality")):
        return Measured(None)
    packed = sum(bool(line.get("counters", {}).get("packed_calls")) for line in modes)
    names = "; ".join(
        f"{line['engine']}: {line['mode']}" + (f" (a gap of {line['gap']} in float64)" if "gap" in line else "")
        for line in unequal
    )
    return Measured(len(unequal), names or f"of {len(modes)} modes, {packed} of which ran packed")


def _is_done(lines: list[dict], stage: str) -> bool:
    return _pick(lines, "end", stage=stage, outcome="done") is not None


def _findings(tool: str) -> Callable[[list[dict]], Measured]:
    def measure(lines: list[dict]) -> Measured:
        line = _pick(lines, "sanitizer", tool=tool)
        if line is None:
            return Measured(None)
        if not line["ran"] or line["findings"] is None:
            return Measured(None, f"{tool} did not come to its end: {line['tail'][-200:]}")
        return Measured(line["findings"])

    return measure


_SIZES = ((32, 1024), (64, 4096))
BARS = (
    Bar("wrong ops, against float64", 0, False, "ops", ("op_accuracy",), _wrong_ops),
    *(
        Bar(f"decode {rows} x {context:,}: share of a copy's bandwidth", 80, True, "%", ("decode",), measure)
        for (rows, context), measure in ((size, _decode_share(*size)) for size in _SIZES)
    ),
    *(
        Bar(f"decode {rows} x {context:,}: share of the best peer's", 95, True, "%", ("decode_peers",), measure)
        for (rows, context), measure in ((size, _decode_beside_peers(*size)) for size in _SIZES)
    ),
    Bar("prefill of 8,192 tokens, head size 128", 350, True, "TFLOP/s", ("prefill",), _prefill),
    Bar("8B shape, 32 x 2,048: captured step over its floor", 1.35, False, "x", ("model_step",), _over_floor),
    Bar("8B shape, 32 x 2,048: dense step over ours", 1.6, True, "x", ("model_step",), _step_gain(32)),
    Bar("8B shape, 1 x 2,048: dense step over ours", 2, True, "x", ("model_step",), _step_gain(1)),
    Bar("1B shape, 32 rows: generate over dense", 2.5, True, "x", ("generate",), _generate_gain("dense eager")),
    Bar(
        "1B shape, 32 rows: generate over generate_batch", 1.5, True, "x",
        ("generate", "generate_batch"), _generate_gain("generate_batch"),
    ),
    Bar("modes whose float32 tokens differ from dense", 0, False, "modes", ("equality",), _unequal_modes),
    *(Bar(f"findings of {tool}", 0, False, "findings", ("sanitizers",), _findings(tool)) for tool in sanitizers.TOOLS),
)  # fmt: skip
