"""Distributions of this checkout, and a fresh environment to install one into."""

import os
import subprocess
import sys
import venv
from collections.abc import Collection
from pathlib import Path

import torch

# Of programs that know nothing of this checkout: not its folders, none of its switches.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_PAGED"))}
OURS = {"hf_paged", "hf_paged_kernels", "hf_paged_integrations", "hf_paged_evals"}
OURS |= {"hf_paged_autoload", "hf_paged_command"}


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build one distribution of a checkout in this environment."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


class FreshEnvironment:
    """A virtual environment with a wheel in it, and the packages of this environment behind it.

    Those are links, so that nothing has to be downloaded. Left out are hf_paged, however this environment has it, and
    all ``.pth`` files, which would bring an editable one back.

    Parameters
    ----------
    folder : Path
        Holds the environment; does not exist yet.
    wheel : Path
    without : Collection of str
        Packages that are left out, by the names they are imported by.
    """

    def __init__(self, folder: Path, wheel: Path, without: Collection[str] = ()):
        self.folder = folder
        venv.create(folder / "venv", symlinks=True)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        behind = [
            _link_packages(Path(entry), folder / f"behind{index}", OURS | set(without))
            for index, entry in enumerate(sys.path)
            if any(Path(entry).glob("*.dist-info"))  # Folders of installed packages; a checkout has none.
        ]
        (self.site / "behind.pth").write_text("".join(f"{path}\n" for path in behind))
        (folder / "work").mkdir()
        done = self.run("python", "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
        assert done.returncode == 0, done.stdout + done.stderr

    def script(self, name: str) -> Path:
        """The path of one of the environment's commands."""
        return self.folder / "venv" / "bin" / name

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess:
        """Run one of the environment's commands, away from the checkout and without a hub."""
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_PAGED_CACHE": str(self.folder / "kernels")}
        return subprocess.run(
            [str(self.script(command)), *arguments],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=self.folder / "work",
            env={**ENVIRONMENT, **own},
        )


def _link_packages(source: Path, folder: Path, without: set[str]) -> Path:
    folder.mkdir()
    for entry in source.iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if name and name not in without and not name.startswith("__") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    assert (folder / "torch").exists() or not torch.__file__.startswith(f"{source}{os.sep}")
    return folder
