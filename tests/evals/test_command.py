"""The command hf-paged eval: its arguments, its files, and runs that are killed or sharded."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hf_paged.cli import main
from hf_paged_evals.evaluate import options_of, parser
from hf_paged_evals.runner import results
from hf_paged_evals.tasks import TASKS
from support.tiny_eval import save_model, save_texts

PERPLEXITY = {"length": 64, "stride": 32, "windows": 24, "chunk": 16, "batch": 2}
GREEDY = {"humaneval": 8, "sharegpt": 0, "new_tokens": 8, "batch": 2, "max_prompt": 200}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return save_model(folder / "model"), save_texts(folder)


def arguments(files, out) -> list[str]:
    tasks = {"greedy": GREEDY, "perplexity": PERPLEXITY}
    settings = [f"{task}.{key}={value}" for task, some in tasks.items() for key, value in some.items()]
    given = ["--model", files[0], "--dataset", files[1], "--out", str(out), "--tasks", *tasks, "--block-size", "4"]
    return ["eval", *given, *(word for setting in settings for word in ("--set", setting))]


def sections(out) -> list[dict]:
    """The sections of the report of a folder, without their times."""
    return [{**section, "seconds": 0} for section in results.load(out)["sections"]]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert main.main(arguments(files, out)) == 0
    return out


def test_a_run_writes_its_report(whole, files):
    found = results.load(whole)
    assert [section["task"] for section in found["sections"]] == ["greedy", "perplexity"]
    assert found["options"]["model"] == files[0] and found["command"].startswith("hf-paged eval --model")
    assert {"processor", "cores", "memory"} <= found["machine"].keys() and "torch" in found["versions"]
    assert "paired difference" in (whole / "report.md").read_text()
    assert "paired difference" in (whole / "report.html").read_text()


def test_what_it_prints(files, whole, capsys):
    assert main.main(arguments(files, whole)) == 0
    out = capsys.readouterr().out
    assert (
        "Exact greedy match: 8 of 8 rows of 8 tokens are equal." in out and "report.html" in out and "WRONG" not in out
    )


def start(command: list[str], **environment) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_report(files, whole, tmp_path):
    child = start([sys.executable, "-m", "hf_paged.cli", *arguments(files, tmp_path)])
    shard, deadline = tmp_path / "samples" / "perplexity.0.jsonl", time.monotonic() + 120
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= 2):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    held = shard.read_bytes()
    assert 2 <= held.count(b"\n") < 12 and not (tmp_path / "results.json").exists()
    assert main.main(arguments(files, tmp_path)) == 0
    assert sections(tmp_path) == sections(whole)
    whole_lines = held[: held.rfind(b"\n") + 1]
    assert shard.read_bytes().startswith(whole_lines), "what was finished was not run again"


@pytest.mark.slow
def test_processes_of_accelerate_share_the_samples(files, whole, tmp_path):
    # "--multi_gpu" is accelerate's word for several processes; without GPUs they run on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    child = start([*launch, "-m", "hf_paged.cli", *arguments(files, tmp_path)])
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, output
    ids = [
        {
            json.loads(line)["id"]
            for line in (tmp_path / "samples" / f"perplexity.{rank}.jsonl").read_text().splitlines()
        }
        for rank in (0, 1)
    ]
    assert len(ids[0]) == len(ids[1]) == 6 and not ids[0] & ids[1]
    assert sections(tmp_path) == sections(whole)
    assert output.count("Exact greedy match:") == 1, "the main process alone reports"


def test_two_runs_are_compared(whole, capsys):
    assert main.main(["eval", "compare", str(whole), str(whole / "results.json")]) == 0
    assert "rows equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "greed"], "no task is called greed: there are greedy, logits"),
        (["--tasks", "greedy", "--limit", "0"], "limit must be at least 1"),
        (["--tasks", "greedy", "--set", "greedy.tokens=3"], "greedy has no setting 'tokens'"),
        (["--tasks", "greedy", "--set", "greedy"], "--set wants TASK.KEY=VALUE"),
        (["--tasks", "greedy", "--dataset-split", "test"], "belong to --dataset"),
        (["--tasks", "greedy", "--model", "nobody/nothing"], "cannot load a tokenizer of 'nobody/nothing'"),
        (["compare", "here", "there"], "no results at here"),
    ],
)
def test_what_is_refused(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["eval", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-paged: ") and message in error


def test_options_of_the_command_line():
    words = "--quick --limit 3 --dtype bfloat16 --backend eager --memory-budget 1MiB --seed 7 --dataset a/b".split()
    words += ["--dataset-column", "q", "--set", "greedy.new_tokens=5", "--set", "choice.question_column=ask"]
    options = options_of(parser().parse_args(words), ["greedy", "choice"])
    assert options.quick and (options.limit, options.dtype, options.backend) == (3, "bfloat16", "eager")
    assert dataclasses.asdict(options.dataset) == {"name": "a/b", "subset": None, "split": None, "column": "q"}
    assert options.extra == {"greedy": {"new_tokens": 5}, "choice": {"question_column": "ask"}}


def test_the_list_of_tasks(capsys):
    assert main.main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    for name, task in TASKS.items():
        assert name == task.name and task.title in out
        assert task.quick.keys() <= task.settings.keys()


def test_a_missing_package_is_named_before_anything_runs(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("hf_paged_evals.report")]:
        monkeypatch.delitem(sys.modules, name)
    assert main.main(arguments(files, tmp_path / "out")) == 1
    assert 'matplotlib is not installed: pip install "hf-paged[evals]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def help_of(*words, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main.main([*words, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_command(capsys):
    assert "eval" in help_of(capsys=capsys)


def test_help_of_eval_names_the_commands_below_it(capsys):
    shown = help_of("eval", capsys=capsys)
    for word in ("compare", "microbench", "model-types", "lm-eval", "triton", "figures"):
        assert f"\n  {word} " in shown
        assert f"usage: hf-paged eval {word} " in help_of("eval", word, capsys=capsys)
