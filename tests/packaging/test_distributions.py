"""Distributions: the wheel holds the packages whole, the source archive the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hf_paged
from support.checkout import ROOT, checkout_files, copy_checkout
from support.distributions import ENVIRONMENT, build

# The folders of the checkout whose packages are installed: their parents are not part of the import name.
PACKAGES = ("hf_paged", "kernels/hf_paged_kernels", "integrations/hf_paged_integrations", "evals/hf_paged_evals")
MODULES = {"hf_paged_autoload.py", "hf_paged_command.py"}
INSTALLED = (".py", ".cpp", ".h", "py.typed")
NOT_ARCHIVED = {".gitignore"}
GENERATED = {"PKG-INFO", "setup.cfg"}


def check_metadata(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def packaged_files() -> set[str]:
    """Files of the checkout that a wheel installs, under the names that they have there."""
    found = set(MODULES)
    for package in PACKAGES:
        parent = package.rpartition("/")[0]
        paths = (name for name in checkout_files() if name.startswith(f"{package}/") and name.endswith(INSTALLED))
        found |= {name.removeprefix(f"{parent}/") for name in paths}
    return found


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture
def archive(tmp_path) -> Path:
    """The source archive."""
    return build(copy_checkout(tmp_path / "checkout"), "sdist", tmp_path / "dist")


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path):
    wheel = build(copy_checkout(tmp_path / "checkout"), "wheel", tmp_path / "dist")
    assert wheel_files(wheel) == packaged_files()
    for package in PACKAGES[:3]:  # Those that others' type checkers see.
        assert f"{package.rpartition('/')[2]}/py.typed" in wheel_files(wheel)
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        assert Parser().parsestr(file.read(metadata).decode())["Version"] == hf_paged.__version__
    check_metadata(wheel)


def test_the_source_archive_is_the_checkout(archive, tmp_path):
    root = unpack(archive, tmp_path / "unpacked")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert root.name == f"hf_paged-{hf_paged.__version__}"
    assert {name for name in found if ".egg-info/" not in name} - GENERATED == checkout_files() - NOT_ARCHIVED
    check_metadata(archive)


def test_types_are_checked_for_the_oldest_python():
    """Of the metadata; ruff takes it from there by itself."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'^requires-python = ">=(.+)"$', project, re.M)
    assert re.findall(r'^python_version = "(.+)"$', project, re.M) == [oldest]
    assert "target-version" not in project


@pytest.mark.slow
def test_the_source_archive_can_be_built_and_tested(archive, tmp_path):
    root = unpack(archive, tmp_path / "unpacked")
    assert wheel_files(build(root, "wheel", tmp_path / "wheel")) == packaged_files()
    path = os.pathsep.join(map(str, (root, root / "kernels", root / "integrations", root / "evals")))
    environment = {**ENVIRONMENT, "PYTHONPATH": path}
    where = "import hf_paged, hf_paged_evals, hf_paged_integrations, hf_paged_kernels as k; print(hf_paged.__file__, k)"
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.count(str(root)) == 2, done.stdout + done.stderr
    tests = [
        "tests/test_public.py",
        "tests/memory",
        "tests/kernels/test_sanitize.py",
        "tests/docs/test_names.py::test_paths_are_found",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr
