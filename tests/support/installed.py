"""Subprocesses in which hf_paged counts as installed, or as not, whatever this interpreter's environment holds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import hf_paged

ROOT = Path(__file__).parent.parent.parent
# What must be importable for hf_paged to be, without an installation.
CHECKOUT = (ROOT, ROOT / "kernels", ROOT / "integrations", ROOT / "evals")


def install(folder: Path) -> Path:
    """Write the metadata that pip would write for the entry points in pyproject.toml."""
    groups = re.findall(
        r'^\[project\.entry-points\."(.+)"\]\n((?:\w.*\n)+)', (ROOT / "pyproject.toml").read_text(), re.M
    )
    about = folder / f"hf_paged-{hf_paged.__version__}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hf-paged\nVersion: {hf_paged.__version__}\n")
    lines = [f"[{group}]\n" + points.replace('"', "") for group, points in groups]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(code: str, *folders: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` with `folders` and the checkout importable, those before this."""
    path = os.pathsep.join(map(str, (*folders, *CHECKOUT)))
    kept = {name: value for name, value in os.environ.items() if "AUTOLOAD" not in name}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folders[0] if folders else None,
        env={**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
    )
