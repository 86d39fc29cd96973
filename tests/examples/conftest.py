"""Leave out programs whose extra is not installed, with a warning that says so."""

import importlib.util
import warnings

import pytest


@pytest.hookimpl(trylast=True)  # After `-m`: what it leaves out needs no warning.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``needs_module(name)`` whose module is missing."""
    for item in list(items):
        missing = [mark.args[0] for mark in item.iter_markers("needs_module") if not _is_installed(mark.args[0])]
        if missing:
            remedy = 'pip install -c constraints.txt -e ".[test,examples]"'
            text = f"{item.name} is deselected: {missing[0]} is not installed: {remedy}"
            warnings.warn(pytest.PytestWarning(text), stacklevel=1)
            config.hook.pytest_deselected(items=[item])
            items.remove(item)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
