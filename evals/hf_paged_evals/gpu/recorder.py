"""The record of a run: one JSON line a finding, on disk as soon as it is found."""

import json
import math
import os
import time
from pathlib import Path

FILE = "gpu.jsonl"
_SHOWN = 300  # Letters of a line that the terminal gets.
_WORDS = 600  # Letters of a text in a line, from its end: the end of a traceback says most.


class Recorder:
    """Appends lines to a file. Several processes may append to the same one.

    Parameters
    ----------
    path : Path
    stage : str
        Stands in every line.
    began : float
        The start of the run by `time.monotonic`, which is the same in all processes.
    """

    def __init__(self, path: Path, stage: str, began: float):
        self.path, self.stage, self.began = path, stage, began

    def of(self, stage: str) -> "Recorder":
        """A recorder of the same run for another stage."""
        return Recorder(self.path, stage, self.began)

    def say(self, kind: str, **values) -> None:
        """Append a line, and show its beginning.

        Parameters
        ----------
        kind : str
            Lines of one kind have the same fields.
        **values
            Numbers, texts, lists and dicts of them. Numbers that JSON lacks become texts, other objects too.
        """
        line = {"t": round(time.monotonic() - self.began, 2), "stage": self.stage, "kind": kind, **values}
        text = json.dumps(_plain(line), allow_nan=False)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:  # One write: lines of two processes never mix.
            os.write(descriptor, text.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        print(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", flush=True)


def read_lines(path: Path) -> list[dict]:
    """The lines of a record, in order.

    Parameters
    ----------
    path : Path
        The file, or the folder that holds it.

    Raises
    ------
    ValueError
        If there is none, or a line is no JSON object.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no record of a GPU run at {path}: name a folder that hf-paged eval gpu --out has written")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(line, dict) or not {"t", "stage", "kind"} <= line.keys():
            raise ValueError(f"{path}, line {number}, is no finding of a GPU run: it lacks t, stage or kind")
        lines.append(line)
    return lines


def _plain(value):
    """A value as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int):
        return value
    text = str(value)
    return text if len(text) <= _WORDS else f"... {text[-_WORDS:]}"
