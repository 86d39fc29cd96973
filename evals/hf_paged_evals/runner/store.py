"""The samples that were run, kept in the folder of a report: a run that was cut off goes on where it was."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from hf_paged_evals.runner.machine import versions
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.task import Task

_RUN = "run.json"
_SAMPLES = "samples"


def claim(options: Options, tasks: list[Task], folder: Path) -> None:
    """Make `folder` that of this run, or go on with the one it holds; other tasks may join it.

    Raises
    ------
    ValueError
        If it holds samples of a run whose options or versions were others: one report cannot mix them.
    """
    path = folder / _RUN
    shared = {key: value for key, value in options.identity().items() if key not in ("tasks", "extra")}
    settings = {task.name: options.settings_of(task) for task in tasks}
    mine = json.loads(json.dumps({"options": shared, "versions": versions(), "settings": settings}))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        mine["settings"] = {**theirs["settings"], **mine["settings"]}
        differing = [*_differing(theirs, mine, "options"), *_differing(theirs, mine, "versions")]
        for task in theirs["settings"]:
            differing += [f"{task}.{words}" for words in _differing(theirs["settings"], mine["settings"], task)]
        if differing:
            raise ValueError(
                f"{folder} holds samples of another run ({'; '.join(differing)}): choose another --out, or delete it"
            )
    (folder / _SAMPLES).mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.new")
    draft.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _differing(theirs: dict, mine: dict, part: str) -> list[str]:
    before, now = theirs[part], mine[part]
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


class Shard:
    """One process' finished samples of one task, a line each, in the order they were finished.

    Parameters
    ----------
    folder : Path
        That of the report.
    task : str
    process : int
        Rank of the process that writes.
    """

    def __init__(self, folder: Path, task: str, process: int):
        self._pattern = f"{task}.*.jsonl"
        self._folder = folder / _SAMPLES
        self.path = self._folder / f"{task}.{process}.jsonl"

    def finished(self) -> dict[str, dict]:
        """Lines of all shards of the task by sample id, as far as they were written to their end."""
        shards = sorted(self._folder.glob(self._pattern))
        return {line["id"]: line for path in shards for line in _whole_lines(path.read_bytes())}

    def append(self, sample: str, seconds: float, record: dict) -> dict:
        """Keep a finished sample; returns its line as it will be read again."""
        line = json.dumps({"id": sample, "seconds": seconds, "record": record})
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
        return json.loads(line)

    def repair(self) -> None:
        """Cut off a last line that a killed process left unfinished."""
        if self.path.exists():
            held = self.path.read_bytes()
            whole = held[: held.rfind(b"\n") + 1]
            if whole != held:
                self.path.write_bytes(whole)


def _whole_lines(held: bytes) -> Iterator[dict]:
    for line in held[: held.rfind(b"\n") + 1].splitlines():
        yield json.loads(line)
