"""The transformers that hf_paged asks for: which versions it refuses, and which it was tested with.

Imports neither transformers nor torch: it is asked before them, where an import of ours would fail without a sentence.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from hf_paged.compat.symbols import missing_symbols
from hf_paged.errors import PagedError

# What is missing below: `_sample` and the cache take other arguments in 5.14, and older caches have other layers.
SUPPORTED_TRANSFORMERS = SpecifierSet(">=5.17")
TESTED_TRANSFORMERS = SpecifierSet(">=5.17,<5.25")


def transformers_version() -> str:
    """The version of the installed transformers."""
    return version("transformers")


def is_tested() -> bool:
    """Tell whether hf_paged was tested with the installed transformers, or with its minor version."""
    return TESTED_TRANSFORMERS.contains(transformers_version(), prereleases=True)


def check_transformers() -> None:
    """Refuse a transformers that hf_paged cannot work with.

    Raises
    ------
    PagedError
        If it is too old, or newer than those tested and without a name that hf_paged relies on.
    """
    try:
        found = transformers_version()
    except PackageNotFoundError:
        return  # Its own import says it best.
    if not SUPPORTED_TRANSFORMERS.contains(found, prereleases=True):
        raise PagedError(
            f"hf_paged needs transformers{SUPPORTED_TRANSFORMERS}, and {found} is installed: "
            f"pip install 'transformers{as_requirement()}'"
        )
    if not is_tested() and (missing := missing_symbols()):
        raise PagedError(
            f"transformers {found} is newer than those that hf_paged was tested with, and lacks what hf_paged relies "
            f"on: {', '.join(map(str, missing))}. Install a newer hf_paged, or "
            f"pip install 'transformers{as_requirement()}'"
        )


def as_requirement() -> str:
    """The tested versions as pip takes them, such as ``>=5.17,<5.25``."""
    return ",".join(sorted(map(str, TESTED_TRANSFORMERS), reverse=True))
