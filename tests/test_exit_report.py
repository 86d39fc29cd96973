"""HF_PAGED_STATS: the statistics of each paged model on stderr at exit, and nothing else than that."""

import gc
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged import exit_report
from hf_paged.models import registry
from hf_paged_integrations.transformers import self_check
from support import zoo
from support.installed import CHECKOUT
from support.packing import LENGTHS


def run(program: str, **environment) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (*CHECKOUT, CHECKOUT[0] / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180, env=environment)


@pytest.fixture
def installed(monkeypatch):
    """The report is switched on, and knows no models but those that the test makes."""
    others, models = weakref.WeakSet(registry.models()), registry.models
    monkeypatch.setattr(registry, "models", lambda: [model for model in models() if model not in others])
    monkeypatch.setattr(exit_report, "_is_installed", True)
    monkeypatch.setattr(exit_report, "_records", [])
    monkeypatch.setattr(exit_report, "_record_of", weakref.WeakKeyDictionary())


def reported(capsys) -> list[dict[str, str]]:
    """The report at this moment, by model: its title, and a text by field."""
    exit_report._report()
    blocks = re.split(r"^hf_paged: statistics of ", capsys.readouterr().err, flags=re.MULTILINE)[1:]
    return [
        {"title": title, **dict(re.findall(r"^  (\w+) +(.+)$", text, re.MULTILINE))}
        for title, _, text in (block.partition(", process") for block in blocks)
    ]


def test_a_model_that_is_alive_is_reported_once_as_it_is_now(installed, capsys):
    model = zoo.build("llama", "paged")
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    model.generate(**zoo.prompts([9, 4]), **LENGTHS, num_beams=2)
    model.generate(**zoo.prompts([9, 4]), **LENGTHS, use_cache=False)
    (said,) = [each for each in reported(capsys) if each["packed_calls"] == "1"]
    assert said["title"] == "LlamaForCausalLM" and said["implementation"] == "paged"
    assert said["fallbacks"].startswith("1 x the call has no cache") and said["gathers"] == "none"


@pytest.mark.parametrize("end", ["gone", "released"])
def test_a_model_that_ends_before_the_program_keeps_its_last_counts(end, installed, capsys):
    model = zoo.build("llama", "paged")
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    alive = weakref.ref(model)
    if end == "gone":
        del model
        gc.collect()
        assert alive() is None, "the report keeps no model"
    else:
        hf_paged.release(model)
    (said,) = [each for each in reported(capsys) if each["packed_calls"] == "1"]
    assert int(said["page_reads"]) > 0


def test_a_model_that_was_only_called_is_reported_while_it_is_alive(installed, capsys):
    model = zoo.build("llama", "paged")
    model.name_or_path = model.model.name_or_path = "a name"
    ids, cache = zoo.prompts([9])["input_ids"], DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(2):
            model(ids, past_key_values=cache)
    (said,) = [each for each in reported(capsys) if each["title"] == "LlamaModel (a name)"]
    assert said["page_reads"] == "2" and said["packed_calls"] == "0"


def test_the_self_check_is_not_reported(installed, capsys):
    before = len(reported(capsys))
    self_check.check_paged()
    assert len(reported(capsys)) == before and not exit_report._records


def test_nothing_is_noted_unless_it_is_switched_on(monkeypatch):
    monkeypatch.setattr(exit_report, "_is_installed", False)
    monkeypatch.setattr(exit_report, "_keep", None)
    zoo.build("llama", "paged").generate(**zoo.prompts([9, 4]), **LENGTHS)


# As a program that cannot be edited: only its attention implementation says "paged".
ZERO_CODE = """
import os, sys, torch, hf_paged_autoload
hf_paged_autoload.install()
from support import zoo
model = zoo.build("llama", sys.argv[1] if len(sys.argv) > 1 else "paged")
def call():
    model.generate(**zoo.prompts([9, 4]), max_new_tokens=3, pad_token_id=0)
"""
FORKS = """
call()
def child(run):
    pid = os.fork()
    if not pid:
        run()
        sys.exit()
    os.waitpid(pid, 0)
    print(pid, file=sys.stderr)
child(call)
child(lambda: None)
print(os.getpid(), file=sys.stderr)
"""


def test_each_process_reports_what_ran_in_it():
    done = run(ZERO_CODE + FORKS, HF_PAGED_STATS="1")
    *_, busy, idle, parent = re.findall(r"^(\d+)$", done.stderr, re.MULTILINE)
    assert done.returncode == 0 and idle not in (busy, parent)
    assert re.findall(r"^hf_paged: statistics of LlamaForCausalLM, process (\d+)$", done.stderr, re.MULTILINE) == [
        busy,
        parent,
    ]
    assert done.stderr.count("  packed_calls        2\n") == done.stderr.count("  packed_calls        1\n") == 1


def test_no_paged_model_no_output():
    done = run("import hf_paged; import torch", HF_PAGED_STATS="1")
    assert done.returncode == 0 and not done.stderr and not done.stdout


# A report that has something to write.
FINISHED = """
import os, sys, torch, hf_paged
from hf_paged import exit_report
exit_report._records.append(exit_report._Record("a model", hf_paged.stats(torch.nn.Module())))
print("done", exit_report._is_installed, flush=True)
"""


@pytest.mark.parametrize("end", ["sys.stderr = None", "sys.stderr.close()", "os.close(2)"])
def test_an_exit_without_stderr_is_not_disturbed(end):
    done = run(FINISHED + end, HF_PAGED_STATS="on")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done True\n", "")
