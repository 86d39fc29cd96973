"""No message of an installed hf_paged needs a checkout."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkout import ROOT, checkout_files

PACKAGES = ("hf_paged", "kernels/", "integrations/", "evals/")
# `hf-paged eval figures` rewrites the pages of a checkout that it is given.
OF_A_CHECKOUT = ("evals/hf_paged_evals/figures/", "evals/hf_paged_evals/command.py")
NAMES = re.compile(r"constraints\.txt|\bpip install (-\S+ )*(-e|\.)|\b(docs|examples|tests)/|\.ci\b|\b[A-Z]+\.md\b")
FILES = [name for name in sorted(checkout_files()) if name.startswith(PACKAGES) and name.endswith(".py")]


def said(path: Path) -> Iterator[str]:
    """The texts in a module's code: every string that is not a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("text", ['try pip install -c constraints.txt -e ".[demo]"', "see docs/models.md", "README.md"])
def test_names_of_a_checkout_are_seen(text, tmp_path):
    (tmp_path / "module.py").write_text(f"def function():\n    'tests/'\n    raise ValueError(f{text!r})\n")
    (found,) = said(tmp_path / "module.py")
    assert NAMES.search(found)


def test_no_message_names_a_file_of_the_checkout():
    assert len(FILES) > 150
    texts = [(name, text) for name in FILES if not name.startswith(OF_A_CHECKOUT) for text in said(ROOT / name)]
    assert [(name, text) for name, text in texts if NAMES.search(text)] == []
