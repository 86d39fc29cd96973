"""The documentation: every link leads somewhere, every reason has its remedy, and what is said of the code is so."""

import ast
import dataclasses
import html
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hf_paged
from hf_paged.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
SOURCES = ("hf_paged", "kernels", "integrations", "evals", "hf_paged_autoload.py")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("hf_paged_docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs and code hosts make them from letters, digits and spaces."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_readme_shows_two_commands():
    """`.ci/run` takes the lines of these blocks and runs them as they are."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "demo" in blocks[0] and "pytest" in blocks[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert ROOT in target.parents, link
        assert not anchor or anchor in anchors(target), link


def test_links_are_found():
    assert sum(len(_LINK.findall(prose(page))) for page in PAGES) > 30
    assert "run-it" in anchors(DOCS / "evaluation.md")


def test_the_table_of_packages_has_the_layers_of_the_contract_in_their_order():
    """`lint-imports` proves the contract; the page on architecture shows it."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split('type = "layers"')[1].split("]")[0]
    layers = re.findall(r'^    "(.+)",$', contract, re.MULTILINE)
    assert len(layers) > 8
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (`hf_paged[^|]*) \|", page, re.MULTILINE)
    rows = [re.findall(r"`([\w.]+)`", row) for row in shown]
    places = []
    for layer in layers:
        found = {number for name in layer.split(" | ") for number, row in enumerate(rows) if name in row}
        assert len(found) >= 1, layer
        places.append(found)
    assert all(max(above) < min(below) for above, below in itertools.pairwise(places)), rows


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    generated = {"contributing.md", "security.md", "changelog.md"}
    assert len(set(listed)) == len(listed)
    assert set(listed) == {page.name for page in DOCS.glob("*.md")} | generated


def test_every_promise_names_a_test_that_exists():
    promised, rest = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## What is not promised")
    rows = [line for line in promised.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]
    assert len(rows) > 15
    for row in rows:
        proofs = re.findall(r"`(tests/[^`]+)`", row.split("|")[2])
        assert proofs, row
        assert all((ROOT / proof).is_file() for proof in proofs), row
    assert all((ROOT / name).is_file() for name in re.findall(r"`(tests/[^`]+)`", rest))


def test_every_reason_stands_with_its_remedy(hooks):
    tables = hooks.reason_tables()
    assert hooks.REASONS_MARK in (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert tables.count("\n| ") == len(Reason) + len(hooks.PARTS)  # A row per reason, and the heads.
    for reason in Reason:
        assert hooks.reason_row(reason) in tables
        row = hooks.reason_row(reason).replace("`", "").lower()
        assert reason.text.replace("...", "…").lower() in row and reason.remedy.lower() in row


def test_a_reason_without_a_remedy_is_refused(hooks, monkeypatch):
    monkeypatch.setattr(Reason.TRAINING, "remedy", " ")
    with pytest.raises(ValueError, match="TRAINING has no remedy"):
        hooks.reason_tables()


def test_a_reason_before_the_first_part_is_refused(hooks, monkeypatch):
    monkeypatch.delitem(hooks.PARTS, Reason.TRAINING)
    with pytest.raises(ValueError, match="TRAINING comes before the first part"):
        hooks.reason_tables()


@pytest.mark.parametrize("field", dataclasses.fields(hf_paged.PagedConfig), ids=lambda field: field.name)
def test_every_field_of_the_config_stands_with_its_default(field):
    default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
    assert f"\n| `{field.name}` | `{default}` | " in (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_every_environment_variable_is_described():
    texts = set()
    for name in SOURCES:
        paths = (ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name]
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    read = {text for text in texts if isinstance(text, str) and re.fullmatch(r"HF_PAGED_[A-Z_]+", text)}
    described = re.findall(r"^\| `(HF_PAGED_[A-Z_]+)", prose(DOCS / "configuration.md"), re.MULTILINE)
    assert len(read) > 4 and set(described) == read


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: hf_paged\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(hf_paged.__all__)


def test_every_error_is_explained():
    errors = [name for name in hf_paged.__all__ if name.endswith("Error")]
    explained = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [name for name in errors if f"`{name}`" not in explained] == ["BlockError"]  # No user's call raises it.


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    paths = (ROOT, ROOT / "kernels", ROOT / "integrations", ROOT / "evals")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_and_holds_every_reason_and_public_name(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "troubleshooting.html").read_text(encoding="utf-8")))
    for reason in Reason:
        assert reason.text.replace("...", "…") in text, reason
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in hf_paged.__all__:
        assert f'id="hf_paged.{name}"' in page, name


@pytest.mark.slow
def test_no_page_asks_for_a_file_from_elsewhere(site):
    pages = list(site.glob("*.html"))
    assert len(pages) > 12
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//", text), page
        assert not re.findall(
            r"<link[^>]+rel=[\"']?(?:stylesheet|icon|preconnect)[^>]+href=[\"']?(?:https?:)?//", text
        ), page


@pytest.mark.slow
def test_no_link_of_the_site_leads_nowhere(site):
    for page in site.glob("*.html"):
        if page.name == "404.html":
            continue
        links = re.findall(r'<a\b[^>]*\shref="([^"]+)"', page.read_text(encoding="utf-8"))
        assert len(links) > 12
        for link in links:
            if not re.match(r"[a-z]+:", link):
                name, _, anchor = html.unescape(link).partition("#")
                target = page if name in ("", ".") else page.parent / name
                assert target.is_file(), f"{page.name}: {link}"
                assert not anchor or f'id="{anchor}"' in target.read_text(encoding="utf-8"), f"{page.name}: {link}"
