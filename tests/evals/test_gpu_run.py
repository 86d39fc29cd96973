"""``hf-paged eval gpu`` without a card: a dry run of all stages, and stages that hang, crash or cannot be imported."""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_paged.cli import main
from hf_paged_evals.gpu import conductor, recorder
from hf_paged_evals.gpu.bars import BARS
from hf_paged_evals.gpu.plan import STAGES, Stage
from hf_paged_evals.runner import results


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    """The folder of a dry run of every stage, made by the command."""
    out = tmp_path_factory.mktemp("gpu") / "dry"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Machines that run tests are slow; each stage keeps its own limit.
    command = [sys.executable, "-m", "hf_paged_evals.gpu", "--dry", "--seconds", "900", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_stage_comes_to_its_end(dry):
    ends = {line["stage"]: line for line in recorder.read_lines(dry) if line["kind"] == "end"}
    assert not [line for line in recorder.read_lines(dry) if line["kind"] == "error"]
    assert {stage.name: "done" for stage in STAGES} == {name: line["outcome"] for name, line in ends.items()}
    assert ends["compile_ahead"]["kernels_compiled"] >= 0


def test_every_line_is_strict_json_with_its_stage(dry):
    names = {stage.name for stage in STAGES} | {"run"}
    for text in (dry / recorder.FILE).read_text(encoding="utf-8").splitlines():
        line = json.loads(text, parse_constant=pytest.fail)
        assert line["stage"] in names and line["t"] >= 0 and line["kind"]


def test_what_cannot_be_measured_has_a_reason(dry):
    refused = {line["what"]: line["why"] for line in recorder.read_lines(dry) if line["kind"] == "refused"}
    assert {"flashinfer", "sdpa cudnn", "memcheck", "racecheck", "other plans"} <= refused.keys()
    assert all(refused.values())


def test_the_ops_and_the_tokens_are_those_of_the_reference(dry):
    lines = recorder.read_lines(dry)
    (accuracy,) = [line for line in lines if line["kind"] == "op_accuracy"]
    assert accuracy["wrong"] == 0 and accuracy["cases"] >= 30
    assert all(line["right"] for line in lines if line["kind"] == "moves_bits")
    padded = [line for line in lines if line["kind"] == "padded_replay"]
    assert len(padded) == 2 and all(line["right"] and line["padding_writes_nothing"] for line in padded)
    modes = [line for line in lines if line["kind"] == "mode"]
    assert len(modes) >= 11 and all(line["equal_rows"] == line["rows"] for line in modes), modes
    assert sum(line["counters"].get("packed_calls", 0) for line in modes) >= 20, "dense was compared with itself"


def test_timed_steps_find_their_prompts_in_the_prefix_cache(dry):
    steps = [line for line in recorder.read_lines(dry) if line["kind"] == "step" and "paged" in line["engine"]]
    assert steps and all(line["counters"]["prefix_hit_tokens"] > 0 and line["step_ms"] > 0 for line in steps)


def test_every_bar_has_a_verdict_that_a_dry_run_cannot_meet(dry):
    verdicts = [line for line in recorder.read_lines(dry) if line["kind"] == "verdict"]
    assert [line["bar"] for line in verdicts] == [bar.name for bar in BARS]
    assert {line["verdict"] for line in verdicts} == {"not measured"}
    assert {line["note"] for line in verdicts} == {"a dry run measures nothing"}


def test_the_report_is_written_from_the_lines_alone(dry, tmp_path, capsys):
    shutil.copy(dry / recorder.FILE, tmp_path)
    assert main.main(["eval", "gpu", "--report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    found = results.load(tmp_path)
    assert [section["task"] for section in found["sections"]] == ["gpu", *(stage.name for stage in STAGES)]
    assert found["versions"]["torch"] and found["machine"]["GPU name"] == "CPU, dry run"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hf_paged on a GPU" in page and page.count("<img") == 4 and "Wrong:" not in page
    assert "Not measured: flashinfer" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_report_needs_no_matplotlib(dry, tmp_path):
    shutil.copy(dry / recorder.FILE, tmp_path)
    arguments = ["eval", "gpu", "--report", str(tmp_path)]
    code = (
        f"import sys; sys.modules['matplotlib'] = None; from hf_paged.cli import main; sys.exit(main.main({arguments}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and "There are no plots: matplotlib is not installed" in page


@dataclasses.dataclass(frozen=True)
class Made(Stage):
    """A stage that is a function of a test."""

    function: Callable | None = None

    def load(self) -> Callable:
        if self.function is None:
            raise ModuleNotFoundError("this stage cannot be imported")
        return self.function


def hang(context) -> None:
    # Its own child hangs as well, and must not outlive it.
    child = subprocess.Popen(["sleep", "600"])
    context.say("started", child=child.pid)
    while True:
        time.sleep(1)


def crash(context) -> None:
    context.say("started")
    os.abort()


def fail(context) -> None:
    raise RuntimeError("out of luck")


def speak(context) -> None:
    context.say("spoke", number=float("nan"), left=context.seconds_left)


def conduct(tmp_path, *stages: Made, seconds: float = 100, only=None) -> tuple[int, list[dict]]:
    options = argparse.Namespace(out=tmp_path / "run", only=only, seconds=seconds, dry=True, report=None)
    code = conductor.conduct(options, stages)
    return code, recorder.read_lines(options.out)


def outcomes(lines: list[dict]) -> dict[str, str]:
    return {line["stage"]: line["outcome"] for line in lines if line["kind"] == "end"}


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_stage_that_hangs_crashes_or_fails_costs_itself_alone(tmp_path):
    faulty = [Made("hang", 6, "hangs", hang), Made("crash", 20, "crashes", crash), Made("fail", 20, "fails", fail)]
    stages = [*faulty, Made("missing", 20, "is missing"), Made("speak", 20, "speaks", speak)]
    code, lines = conduct(tmp_path, *stages)
    assert code == 1
    assert outcomes(lines) == {
        "hang": "killed after its 6 seconds",
        "crash": "died of SIGABRT",
        "fail": "failed: its error stands above",
        "missing": "failed: its error stands above",
        "speak": "done",
    }
    kinds = {(line["stage"], line["kind"]): line for line in lines}
    assert "out of luck" in kinds["fail", "error"]["error"]
    assert "cannot be imported" in kinds["missing", "error"]["error"]
    assert kinds["speak", "spoke"]["number"] == "nan" and 0 < kinds["speak", "spoke"]["left"] <= 20
    assert not is_running(kinds["hang", "started"]["child"])
    assert sum(line["kind"] == "verdict" for line in lines) == len(BARS)
    assert (tmp_path / "run" / "report.html").exists()


def test_the_time_of_the_whole_run_is_kept(tmp_path):
    code, lines = conduct(tmp_path, Made("hang", 30, "", hang), Made("speak", 30, "", speak), seconds=6)
    assert code == 1 and lines[-1]["kind"] == "verdict"
    assert outcomes(lines)["hang"].startswith("killed after its ")
    assert outcomes(lines)["speak"] == "not run: the 6 seconds of the run are over"


def test_named_stages_alone_are_run(tmp_path):
    code, lines = conduct(tmp_path, Made("crash", 20, "", crash), Made("speak", 20, "", speak), only=["speak"])
    assert code == 0 and outcomes(lines) == {"speak": "done"}


def test_without_a_gpu_it_is_one_sentence_and_nothing_is_written(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hf_paged_evals.gpu", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not done.stdout and not out.exists()
    assert "finds no CUDA GPU here: run this on a machine with one" in done.stderr and "--dry" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    conduct(tmp_path, Made("speak", 20, "", speak))
    with pytest.raises(ValueError, match="holds a run already: name another folder"):
        conduct(tmp_path, Made("speak", 20, "", speak))


@pytest.mark.parametrize("words, message", [(["--only", "decoding"], "no stage is called decoding"), (["--x"], "--x")])
def test_what_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main.main(["eval", "gpu", *words])
    assert message in capsys.readouterr().err


def test_a_report_without_lines_is_refused(tmp_path, capsys):
    assert main.main(["eval", "gpu", "--report", str(tmp_path)]) == 1
    assert "no record of a GPU run" in capsys.readouterr().err
    (tmp_path / recorder.FILE).write_text('{"t": 0, "stage": "run"}\n')
    assert main.main(["eval", "gpu", "--report", str(tmp_path)]) == 1
    assert "line 1, is no finding of a GPU run" in capsys.readouterr().err


def test_every_stage_is_listed_with_its_time(capsys):
    with pytest.raises(SystemExit):
        main.main(["eval", "gpu", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {stage.name} " in out and stage.title in out for stage in STAGES)
