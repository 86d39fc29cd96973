"""The private names that hf_paged relies on are there, are declared, and are touched in `hf_paged.compat` alone."""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers import cache_utils, configuration_utils, generation, modeling_utils, pipelines

import hf_paged
import hf_paged_integrations
import hf_paged_kernels
from hf_paged.compat import symbols
from hf_paged.compat.symbols import OPTIONAL, SYMBOLS, Symbol
from hf_paged.compat.transformers import WRAPPED_FUNCTIONS

ROOT = pathlib.Path(__file__).parent.parent.parent
COMPAT = pathlib.Path(symbols.__file__).parent
KERNELS_COMPAT = pathlib.Path(hf_paged_kernels.__file__).with_name("compat.py")
PACKAGES = [pathlib.Path(package.__file__).parent for package in (hf_paged, hf_paged_kernels, hf_paged_integrations)]
PINNED = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
FOREIGN = ("torch", "transformers", "triton")
# Documented by Python, underscore or not.
PYTHONS_OWN = {"_asdict", "_fields", "_replace", "_missing_", "_value_"}
# Names that objects of these have are taken for theirs, though a class of ours may have one of the same name.
INSTANCES = [torch.nn.Module(), torch.empty(0), transformers.GenerationConfig(), transformers.DynamicCache()]
FILES = [torch, modeling_utils, configuration_utils, cache_utils, generation, pipelines, torch.overrides, torch.ops]


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def private_parts(dotted: str) -> set[str]:
    parts = dotted.split(".")
    return {part for part in parts if is_private(part)} if all(part.isidentifier() for part in parts) else set()


def foreign_names() -> set[str]:
    """Private names that torch, transformers or their objects have."""
    names = {name for thing in (*INSTANCES, *FILES) for name in dir(thing)}
    classes = [value for file in FILES for value in vars(file).values() if isinstance(value, type)]
    names.update(name for kind in classes for name in (*dir(kind), *getattr(kind, "__annotations__", ())))
    for symbol in SYMBOLS:
        names.update((symbol.word or "", *symbol.path.split(".")))
    return {name for name in names if is_private(name)}


class Definitions(ast.NodeVisitor):
    """Private names that our code defines: functions, classes, variables, fields, and attributes of ``self``."""

    def __init__(self):
        self.everywhere: set[str] = set()
        self.of_class: dict[str, set[str]] = {}
        self.bases: dict[str, set[str]] = {}
        self._class: list[str] = []

    def _define(self, name: str) -> None:
        if is_private(name):
            self.everywhere.add(name)
            for kind in self._class[-1:]:
                self.of_class[kind].add(name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._define(node.name)
        self._class.append(node.name)
        self.of_class.setdefault(node.name, set())
        self.bases.setdefault(node.name, set()).update(ast.unparse(base).split("[")[0] for base in node.bases)
        self.generic_visit(node)
        self._class.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._define(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._define(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store) and is_self(node.value):
            self._define(node.attr)
        self.generic_visit(node)

    def of(self, kind: str) -> set[str]:
        """Names that a class of ours defines or inherits from a class of ours."""
        return self.of_class.get(kind, set()).union(*(self.of(base) for base in self.bases.get(kind, ())))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


class Uses(ast.NodeVisitor):
    """Private names that a file takes from objects or modules which are not ours, each as (line, text)."""

    def __init__(self, ours: Definitions, foreign: set[str]):
        self.found: list[tuple[int, str]] = []
        self._ours, self._foreign = ours, foreign
        self._python: set[str] = set()  # Modules of Python's that the file imports.
        self._class: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            top = alias.name.partition(".")[0]
            if top in sys.stdlib_module_names:
                self._python.add(alias.asname or top)
            elif top in FOREIGN and private_parts(alias.name):
                self.found.append((node.lineno, ast.unparse(node)))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = {node.module or "", *(alias.name for alias in node.names)}
        if (node.module or "").partition(".")[0] in FOREIGN and any(map(private_parts, names)):
            self.found.append((node.lineno, ast.unparse(node)))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._class.append(node.name)
        self.generic_visit(node)
        self._class.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr) and not self._is_ours(node):
            self.found.append((node.lineno, ast.unparse(node)))
        self.generic_visit(node)

    def _is_ours(self, node: ast.Attribute) -> bool:
        if node.attr in PYTHONS_OWN or (isinstance(node.value, ast.Name) and node.value.id in self._python):
            return True
        if is_self(node.value) and self._class:
            return node.attr in self._ours.of(self._class[-1])
        return node.attr in self._ours.everywhere - self._foreign

    def visit_Constant(self, node: ast.Constant) -> None:
        """``getattr(config, "_name")``, ``operator.attrgetter("_name")``, ``"torch._dynamo"``."""
        words = private_parts(node.value.strip(".")) if isinstance(node.value, str) else set()
        ours = self._ours.everywhere - self._foreign
        if any(word not in ours and not word.startswith("_hf_paged") for word in words):
            self.found.append((node.lineno, node.value))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Only a part of a longer word."""


def trees(roots: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, ast.Module]]:
    for root in roots:
        for file in [root] if root.is_file() else sorted(root.rglob("*.py")):
            yield file, ast.parse(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ours() -> Definitions:
    """Definitions of the code outside `compat`."""
    definitions = Definitions()
    for file, tree in trees(PACKAGES):
        if COMPAT not in file.parents and file != KERNELS_COMPAT:
            definitions.visit(tree)
    return definitions


def used(text: str, ours: Definitions) -> list[str]:
    uses = Uses(ours, foreign_names())
    uses.visit(ast.parse(text))
    return [name for _, name in uses.found]


@pytest.mark.parametrize("symbol", SYMBOLS, ids=str)
def test_every_declared_name_is_there(symbol):
    may_be_missing = symbol in OPTIONAL and transformers.__version__ != PINNED
    assert symbol.is_there() or may_be_missing, f"{symbol} is gone: find what replaces it, in hf_paged/compat"


def test_optional_names_are_declared():
    assert OPTIONAL <= set(SYMBOLS)


@pytest.mark.parametrize(
    "symbol",
    [
        Symbol("transformers.no_such_file", "GenerationMixin._sample"),
        Symbol("transformers", "GenerationMixin._no_such_loop"),
        Symbol("transformers.masking_utils", "and_masks", "no_such_function"),
    ],
    ids=str,
)
def test_a_name_that_is_gone_is_found_out(symbol, monkeypatch):
    monkeypatch.setattr(symbols, "SYMBOLS", (*SYMBOLS, symbol))
    assert symbols.missing_symbols() == [symbol]


def test_no_other_code_touches_private_names(ours):
    foreign, found = foreign_names(), []
    for file, tree in trees(PACKAGES):
        if COMPAT not in file.parents and file != KERNELS_COMPAT:
            uses = Uses(ours, foreign)
            uses.visit(tree)
            found += [f"{file}:{line}: {text}" for line, text in uses.found]
    assert not found, "give these a plain name in hf_paged/compat:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "from torch.overrides import _get_current_function_mode_stack",
        "from torch.utils._pytree import tree_map",
        "import torch._dynamo as dynamo",
        "import torch\ntorch._C.anything",
        "def f(model): return model._supports_sdpa",
        "def f(inspection): return inspection._modules",  # Named as one of ours may be; a module has it as well.
        "class Layer(DynamicLayer):\n def f(self): return self._dtype_of_theirs",
        "import operator\nversion = operator.attrgetter('_version')",
        "def f(cache): return getattr(cache, '_is_user_defined', False)",
        "def f(kind): return kind.__module__.startswith('torch._dynamo.')",
    ],
)
def test_a_private_name_is_seen(code, ours):
    assert used(code, ours)


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys._getframe(1)",
        "def f(pair): return pair._replace(first=1)",
        "class KVPool:\n def __init__(self): self.name = self.__class__.__name__",
        "def f(model): return model.state_dict(), '__call__', '_ a sentence', '_'",
    ],
)
def test_a_plain_name_is_not_taken_for_a_private_one(code, ours):
    assert not used(code, ours)


def test_compat_declares_what_it_touches_and_no_more():
    """Undocumented names without an underscore are declared as well; only the private ones can be told in the code."""
    definitions, touched = Definitions(), set()
    for _, tree in trees([COMPAT, KERNELS_COMPAT]):
        definitions.visit(tree)
    for file, tree in trees([COMPAT, KERNELS_COMPAT]):
        if file.name == pathlib.Path(symbols.__file__).name:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                touched.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                touched |= private_parts(node.value.strip("."))
            elif isinstance(node, ast.ImportFrom):
                touched.update(name for alias in node.names for name in (*node.module.split("."), alias.name))
    touched = {name for name in touched if is_private(name)} - definitions.everywhere
    declared = {symbol.word or "" for symbol in SYMBOLS}
    declared.update(name for symbol in SYMBOLS for name in (*symbol.module.split("."), *symbol.path.split(".")))
    assert touched <= declared
    # A constructor or function in which a word is looked for is named by no code of ours.
    named = {part for symbol in SYMBOLS for part in [symbol.word or symbol.path.rpartition(".")[2]]}
    assert {name for name in named if is_private(name)} <= touched


@pytest.mark.parametrize("function", WRAPPED_FUNCTIONS, ids=str)
def test_functions_that_hooks_replace_take_the_arguments_that_they_expect(function):
    assert function.is_as_expected()


def test_the_words_of_a_module_are_its_attributes():
    words = {symbol.word for symbol in SYMBOLS if symbol.module == "torch.nn"}
    assert words <= vars(torch.nn.Module()).keys()
