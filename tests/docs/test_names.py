"""The files, modules and classes that the documentation names exist."""

import re
from pathlib import Path

import pytest

from hf_paged_evals.microbench.command import NAMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "README.md"]
# Where a path of a page may begin: `memory/block_pool.py` lies in hf_paged.
FOLDERS = ("", "hf_paged", "kernels/hf_paged_kernels", "integrations", "integrations/hf_paged_integrations", "kernels")
PACKAGES = ("hf_paged", "kernels", "integrations", "evals")


def named_paths(page: Path) -> set[str]:
    """The words in code font that look like the path of a file or of a folder of the repository."""
    words = set(re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")))
    return {word for word in words if "/" in word and word[0] not in "./"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    for name in named_paths(page):
        tried = [ROOT / folder / f"{name.rstrip('/')}{ending}" for folder in FOLDERS for ending in ("", ".py")]
        assert any(path.exists() for path in tried), name


def test_paths_are_found():
    assert len(named_paths(ROOT / "CONTRIBUTING.md")) > 20


def test_modules_and_microbenchmarks_that_pages_run_exist():
    ran = {
        name for page in PAGES for name in re.findall(r"python -m (hf_paged_evals\.[\w.]+)", page.read_text("utf-8"))
    }
    for name in ran:
        assert (ROOT / "evals" / f"{name.replace('.', '/')}.py").is_file(), name
    named = {name for page in PAGES for name in re.findall(r"hf-paged eval microbench (\w+)", page.read_text("utf-8"))}
    named.discard("NAME")
    assert len(named) > 3 and named <= set(NAMES)


def test_classes_of_the_glossary_exist():
    sources = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    classes = {name for path in sources for name in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE)}
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    named = {name for row in glossary.splitlines() for name in re.findall(r"\| `([A-Z]\w+)(?:\.\w+)?` \|$", row)}
    assert len(named) > 15
    assert named <= classes, named - classes
