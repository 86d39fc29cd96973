"""hf-paged doctor: it describes the machine, and is right on the point that counts: "paged" works here or not."""

import dataclasses
import operator
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import transformers

import hf_paged
from hf_paged import PagedConfig
from hf_paged.cli import main
from hf_paged.cli.doctor import known_pairs, machine, report
from hf_paged.compat import requirements
from hf_paged.compat import transformers as upstream
from hf_paged.memory import sizing
from hf_paged.models import forward_context
from hf_paged_integrations import autoload
from hf_paged_integrations.pipelines import text_generation
from hf_paged_integrations.transformers import eligibility, hooks, self_check, version_gate
from hf_paged_kernels import ops
from support.installed import CHECKOUT

ROOT = Path(__file__).parent.parent.parent


def examine(capsys):
    """(exit code, what was printed, one entry a label)"""
    code = main.main(["doctor"])
    out = capsys.readouterr().out
    return code, out, {line[2:18].strip(): line[18:] for line in out.splitlines() if line.startswith("  ")}


def test_a_healthy_machine(capsys, monkeypatch):
    monkeypatch.setattr(sizing, "available_memory", lambda device: 4 * 10**9)
    state = torch.get_rng_state()
    code, out, said = examine(capsys)
    assert code == 0 and out.endswith('attn_implementation="paged" works here.\n')
    assert torch.equal(torch.get_rng_state(), state)
    assert said["hf_paged"] == hf_paged.__version__ and said["torch"] == torch.__version__
    assert said["transformers"] == f"{transformers.__version__} (tested: >=5.17,<5.25)"
    assert said["block size"] == f"{PagedConfig().block_size} tokens"
    shares = "25% of what is available now, 75% of it on a GPU"
    assert said["memory budget"].startswith(f"1,000,000,000 bytes (954 MiB): {shares}")
    # 2 layers; 16 new tokens, all of which come from pages.
    assert "32 page reads, 0 gathers" in said["a tiny llama"]
    assert said["a tiny pipeline"].startswith("its items run together")
    assert "model.config._attn_implementation names" in out


def test_it_enables_what_was_disabled(capsys):
    hf_paged.disable()
    assert examine(capsys)[0] == 0


def fake_command(folder, name, answer, code=0):
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    """An empty folder that is all of PATH; no compiler is named either."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_no_compiler(bare_path, capsys):
    code, _, said = examine(capsys)
    assert code == 0
    assert said["C++"].startswith("no C++ compiler was found that runs (c++, g++, clang++): install one (apt")


def test_compilers_are_tried_in_order(bare_path, capsys, monkeypatch):
    fake_command(bare_path, "clang++", "clang 18")
    assert examine(capsys)[2]["C++"] == "clang 18"
    fake_command(bare_path, "c++", "broken", code=1)
    fake_command(bare_path, "g++", "g++ 12")
    assert examine(capsys)[2]["C++"] == "g++ 12"
    monkeypatch.setenv("CXX", fake_command(bare_path, "mine", "mine 1") + " -std=c++20")
    assert examine(capsys)[2]["C++"] == "mine 1"


@pytest.mark.parametrize("stated", ["no-such-compiler -O3", "c++ 'unclosed"])
def test_a_wrong_cxx_is_not_passed_over(stated, monkeypatch, capsys):
    monkeypatch.setenv("CXX", stated)
    code, _, said = examine(capsys)
    assert code == 0 and f"CXX={stated} is no C++ compiler that runs here" in said["C++"]


def test_gpus_and_driver(bare_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "gpus", lambda: [])
    said = examine(capsys)[2]
    assert said["device"].startswith("none") and said["driver"] == "no NVIDIA driver found"
    assert said["GPU attention"] == "nothing: torch sees no GPU"
    fake_command(bare_path, "nvidia-smi", "550.54.15")
    assert examine(capsys)[2]["driver"] == "NVIDIA 550.54.15"
    monkeypatch.setattr(report, "gpus", lambda: ["Some GPU, capability 9.0, 80.0 GiB"])
    said = examine(capsys)[2]
    assert said["cuda:0"].startswith("Some GPU") and said["driver"] == "550.54.15"
    assert "plain torch" in said["GPU attention"]


@pytest.mark.parametrize("found", [{"avx2": True, "avx512_f": False}, {"neon": True}])
def test_vector_units_are_those_of_the_processor(found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert list(machine.vector_units().values()) == list(found.values())


def install_transformers(monkeypatch, number):
    for module in (requirements, report):
        monkeypatch.setattr(module, "version", lambda name: number)


def test_a_transformers_that_is_too_old(capsys, monkeypatch):
    install_transformers(monkeypatch, "5.16.1")
    code, out, said = examine(capsys)
    assert code == 1
    assert said["transformers"] == "5.16.1 (not tested: >=5.17,<5.25)" and said["a tiny llama"] == "not run"
    assert "cannot work here: hf_paged needs transformers>=5.17, and 5.16.1 is installed" in out
    assert out.endswith("pip install 'transformers>=5.17,<5.25'\n")


def test_a_transformers_that_is_newer_than_those_tested(capsys, monkeypatch):
    install_transformers(monkeypatch, "9.0.0")
    monkeypatch.setattr(version_gate, "_is_open", True)
    code, out, said = examine(capsys)
    assert code == 0 and said["transformers"] == "9.0.0 (not tested: >=5.17,<5.25)"
    assert out.endswith('attn_implementation="paged" works here.\n')


def test_hooks_that_are_refused(capsys, monkeypatch):
    hf_paged.disable()
    monkeypatch.setattr(transformers.DynamicCache, "__init__", lambda self, config=None: None)
    code, out, said = examine(capsys)
    assert code == 1 and said["a tiny llama"] == "not run"
    assert "DynamicCache.__init__" in out and "In a fresh environment: pip install" in out


def no_page_read(model):
    return dataclasses.replace(hf_paged.stats(model), page_reads=0)


def two_blocks_kept(model):
    return dataclasses.replace(hf_paged.stats(model), used_blocks=2)


def not_packed(model):
    return dataclasses.replace(hf_paged.stats(model), packed_calls=0)


def gathered(model):
    return dataclasses.replace(hf_paged.stats(model), gathers={"the model applies aten.view to them": 1})


def without_our_loop(original, model, *args, **kwargs):
    return original(model, *args, **kwargs)


def unhooked(original, pipe, *args, **kwargs):
    return original(pipe, *args, **kwargs)


def read_in_turn(results, outputs_of):
    """As if another transformers chained the stages of a pipeline in another way."""


FAULTS = {
    "wrong attention": (ops, "write_and_attend", lambda query, *_: torch.zeros_like(query), "mixes the rows"),
    "no call is seen": (forward_context, "track", lambda model: None, "outside a paged model"),
    "no page is read": (self_check, "stats", no_page_read, "without reading any page"),
    "blocks are kept": (self_check, "stats", two_blocks_kept, "left 2 blocks"),
    "an exception": (ops, "write_and_attend", lambda *_: 1 / 0, "ZeroDivisionError"),
    "no call is packed": (self_check, "stats", not_packed, "not packed, and no reason was counted"),
    "a gather": (self_check, "stats", gathered, "were gathered, because the model applies aten.view"),
    "the loop is not ours": (hooks, "scheduled_sample", without_our_loop, "not packed, and no reason was counted"),
    "a new input": (eligibility, "_MODEL_ARGUMENTS", {"attention_mask"}, "itself adds inputs that hf_paged does not"),
    "no iterator": (hooks, "iterate", unhooked, "one after another, and no reason was counted"),
    "other stages": (text_generation, "replace_forwards", read_in_turn, "one after another, and no reason was counted"),
    "a private name is gone": (upstream, "_prepare", operator.attrgetter("_gone"), "in another way than hf_paged exp"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_that_fails(fault, capsys, monkeypatch):
    owner, name, replacement, words = FAULTS[fault]
    monkeypatch.setattr(owner, name, replacement)
    code, out, said = examine(capsys)
    assert code == 1 and said["a tiny llama"].startswith("failed: a tiny ") and words in said["a tiny llama"]
    assert 'Remedy: load models with attn_implementation="sdpa", or install' in said["a tiny llama"]
    assert 'does not work here: use attn_implementation="sdpa"; install another transformers of those tested' in out


@pytest.mark.parametrize(
    ("peft", "found", "is_named"),
    [("0.21.2", "5.24.0", True), ("0.21.0", "5.25.1", True), ("0.21.2", "5.23.0", False), ("0.22.0", "5.24.0", False)],
)
def test_packages_that_go_wrong_together_are_a_line_and_no_failure(peft, found, is_named, capsys, monkeypatch):
    monkeypatch.setattr(known_pairs, "version", {"peft": peft, "transformers": found}.__getitem__)
    code, _, said = examine(capsys)
    assert code == 0 and ("peft" in said) == is_named
    if is_named:
        assert said["peft"].startswith(f"{peft} with transformers {found}: prefix tuning is ignored")
        assert "Remedy: install transformers<5.24" in said["peft"]


def test_the_defaults_are_those_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("HF_PAGED_BLOCK_SIZE", "64")
    monkeypatch.setenv("HF_PAGED_MEMORY_BUDGET", "1MiB")
    monkeypatch.setenv("HF_PAGED_CACHE_SALT", "a secret")
    code, out, said = examine(capsys)
    assert code == 0 and said["block size"] == "64 tokens, by HF_PAGED_BLOCK_SIZE"
    assert said["memory budget"] == "1,048,576 bytes (1.00 MiB), by HF_PAGED_MEMORY_BUDGET"
    assert said["token budget"] == "512 tokens a step, 4,096 on a GPU"
    assert said["cache salt"] == "set, by HF_PAGED_CACHE_SALT" and "secret" not in out
    assert said["prefix share"] == "12.5% of the memory budget" and said["eviction policy"] == "lru"
    assert "32 page reads" in said["a tiny llama"], "the check has a config of its own"


def test_a_wrong_environment_fails(capsys, monkeypatch):
    monkeypatch.setenv("HF_PAGED_TOKEN_BUDGET", "many")
    code, out, said = examine(capsys)
    words = "HF_PAGED_TOKEN_BUDGET=many cannot be used: token_budget must be a positive number of tokens; got 'many'"
    assert code == 1 and said["environment"].startswith(words)
    last = out.splitlines()[-1]
    assert last.startswith('attn_implementation="paged" cannot work with this environment: HF_PAGED_TOKEN_BUDGET=many')
    assert last.endswith("Or unset the variable.")


def command(*arguments, before=()):
    """Run the command of the checkout; the folders `before` it may hide other packages."""
    script = [sys.executable, str(ROOT / "hf_paged_command.py"), *arguments]
    path = os.pathsep.join(map(str, (*before, *CHECKOUT)))
    return subprocess.run(script, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.slow
def test_the_command_outlives_an_import_that_fails(tmp_path):
    """As after ``pip install transformers==4.57``: importing hf_paged raises before any other of its code runs."""
    about = tmp_path / "transformers-4.57.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    done = command("doctor", before=[tmp_path])
    assert done.returncode == 1 and not done.stdout
    first, second = done.stderr.splitlines()
    assert "cannot work here: hf_paged needs transformers>=5.17, and 4.57.0 is installed" in first
    assert second == "hf-paged: transformers is 4.57.0: pip install 'transformers>=5.17'"


@pytest.mark.slow
def test_the_command_runs_the_package():
    done = command("plan", "demo", "--batch", "0", "--context", "1")
    assert done.returncode == 1 and done.stderr == "hf-paged: --batch must be at least 1; got 0\n"


def test_zero_code_activation(capsys, monkeypatch):
    def said(points, **environment):
        monkeypatch.setattr(autoload, "entry_points", lambda group: points)
        for name in (autoload.SWITCH, autoload.TORCH_SWITCH):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return examine(capsys)[2]["zero-code"]

    ours = [EntryPoint("hf_paged", "hf_paged_autoload:install", "torch.backends")]
    assert said(ours) == 'on: attn_implementation="paged" works without `import hf_paged`'
    assert said([]).endswith(
        "needs `import hf_paged`: hf_paged is not installed, or by a version without it: pip install it anew"
    )
    for name in (autoload.SWITCH, autoload.TORCH_SWITCH):
        assert said(ours, **{name: "0"}) == f'off, attn_implementation="paged" needs `import hf_paged`: {name}=0 is set'
