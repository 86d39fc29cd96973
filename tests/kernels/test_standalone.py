"""The kernels' package is of use without the rest: all of it imports, and its ops run."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent.parent / "kernels"
CODE = """
import importlib, pkgutil, sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_paged", "hf_paged_integrations", "hf_paged_evals", "transformers"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refusal())
import hf_paged_kernels

names = [module.name for module in pkgutil.walk_packages(hf_paged_kernels.__path__, "hf_paged_kernels.")]
for name in names:
    importlib.import_module(name)

import torch
from hf_paged_kernels import backends, ops

caches = [torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 2, 4, 8) for _ in "kv"]
ops.copy_blocks(*caches, torch.tensor([1]), torch.tensor([0]))
print(len(names), hf_paged_kernels.__file__, [backend.name for backend in backends.registered()], caches[0].unique())
"""


def test_the_package_imports_on_its_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count = sum(1 for path in KERNELS.rglob("*.py")) - 1  # Without the package itself.
    file = KERNELS / "hf_paged_kernels" / "__init__.py"
    assert done.stdout == f"{count} {file} ['cpp', 'triton', 'torch'] tensor([1.])\n"
