"""No code comes from a model hub, or from the folder of a model."""

import ast
import json
from pathlib import Path

import pytest

import hf_paged
from hf_paged.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hf_paged", "kernels", "integrations", "evals")


def test_plan_does_not_run_the_code_of_a_folder(tmp_path, capsys):
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedConfig\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(PreTrainedConfig):\n"
        "    model_type = 'own'\n"
    )
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--batch", "1", "--context", "16"]) == 1
    printed = capsys.readouterr()
    assert "contains custom code" in printed.err
    assert not printed.out, "the user is asked, and might say yes"
    assert not marker.exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_call_trusts_remote_code_or_loads_kernels_of_a_hub(folder):
    assert Path(hf_paged.__file__).resolve().parent.parent == ROOT
    paths = [path for path in (ROOT / folder).rglob("*.py") if ROOT / folder in path.resolve().parents]
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                is_refused = isinstance(node.value, ast.Constant) and node.value.value is False
                assert is_refused, f"{path}:{node.value.lineno}"
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "kernels" for alias in node.names), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] != "kernels", f"{path}:{node.lineno}"
