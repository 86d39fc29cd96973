"""The runner: nothing that was finished is lost or run twice, and no two runs are mixed."""

import dataclasses
import json

import pytest

from hf_paged_evals.runner import store
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.run import run_tasks
from hf_paged_evals.runner.section import Figure, Section
from hf_paged_evals.runner.task import Sample


class Squares:
    """A task that notes what it runs, and fails at one sample if told to."""

    name, title, settings, quick, is_timed = "squares", "Squares", {"count": 6}, {"count": 3}, False

    def __init__(self, fails_at=None):
        self.fails_at, self.ran = fails_at, []

    def samples(self, options):
        return [Sample(f"n {n}", {"n": n}) for n in range(options.settings_of(self)["count"])]

    def run(self, sample, models):
        n = sample.payload["n"]
        if n == self.fails_at:
            raise KeyboardInterrupt
        self.ran.append(n)
        return {"square": n * n, "third": n / 3}

    def summarise(self, records, options):
        total = sum(record["square"] for record in records)
        return Section(self.name, self.title, f"{total}", [Figure("third", sum(r["third"] for r in records), "")])


def run(task, folder, **fields):
    (section,) = run_tasks(Options(str(folder), (task.name,), model="none", **fields), [task])
    return dataclasses.replace(section, seconds=0.0)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    expected = run(Squares(), tmp_path / "whole")
    first, second = Squares(fails_at=4), Squares()
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "cut")
    assert run(second, tmp_path / "cut") == expected
    assert (first.ran, second.ran) == ([0, 1, 2, 3], [4, 5])


def test_a_finished_run_runs_nothing(tmp_path):
    expected, again = run(Squares(), tmp_path), Squares()
    assert run(again, tmp_path) == expected and again.ran == []


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    expected = run(Squares(), tmp_path)
    path = tmp_path / "samples" / "squares.0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = Squares()
    assert run(again, tmp_path) == expected and again.ran == [5]
    assert len(path.read_text().splitlines()) == 6, "the half line is gone"


def test_times_are_those_of_all_samples(tmp_path):
    (section,) = run_tasks(Options(str(tmp_path), ("squares",), model="none"), [Squares()])
    lines = map(json.loads, (tmp_path / "samples" / "squares.0.jsonl").read_text().splitlines())
    assert section.seconds == sum(line["seconds"] for line in lines) > 0


def test_other_options_are_refused(tmp_path):
    run(Squares(), tmp_path)
    with pytest.raises(
        ValueError, match=r"another run \(dtype was 'float32' and is 'bfloat16'\): choose another --out"
    ):
        run(Squares(), tmp_path, dtype="bfloat16")


def test_other_settings_are_refused_and_other_tasks_are_welcome(tmp_path):
    expected = run(Squares(), tmp_path)
    cubes = Squares()
    cubes.name = "cubes"
    run(cubes, tmp_path, extra={"cubes": {"count": 4}})
    assert run(Squares(), tmp_path) == expected
    with pytest.raises(ValueError, match=r"\(cubes.count was 4 and is 5\)"):
        run(cubes, tmp_path, extra={"cubes": {"count": 5}})


def test_other_versions_are_refused(tmp_path, monkeypatch):
    run(Squares(), tmp_path)
    monkeypatch.setattr(store, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(ValueError, match="torch was .* and is '0.1'"):
        run(Squares(), tmp_path)


def test_shards_of_other_processes_count(tmp_path):
    expected = run(Squares(), tmp_path)
    path = tmp_path / "samples" / "squares.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::2]))
    (tmp_path / "samples" / "squares.1.jsonl").write_text("".join(lines[1::2]))
    again = Squares()
    assert run(again, tmp_path) == expected and again.ran == []


def test_a_task_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="squares has no samples"):
        run(Squares(), tmp_path, extra={"squares": {"count": 0}})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tasks": ()}, "no task was named"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"block_size": 5}, "block_size must be a power of two"),
        ({"memory_budget": "much"}, "memory_budget must be"),
        ({"extra": {"other": {}}}, "settings for other, which is not among the tasks squares"),
        ({"kv_dtype": "float8_e4m3fn", "backend": "sdpa"}, "use --backend paged"),
    ],
)
def test_wrong_options_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Options(**{"out": "x", "tasks": ("squares",), **fields})


def test_settings_are_the_tasks_then_quick_then_extra():
    def settings(**fields):
        return Options("x", ("squares",), **fields).settings_of(Squares())["count"]

    assert settings() == 6 and settings(quick=True) == 3
    assert settings(quick=True, extra={"squares": {"count": 9}}) == 9
    with pytest.raises(ValueError, match="squares has no setting 'size': it knows count"):
        settings(extra={"squares": {"size": 9}})
    with pytest.raises(ValueError, match="squares.count must be like 6; got 'many'"):
        settings(extra={"squares": {"count": "many"}})
