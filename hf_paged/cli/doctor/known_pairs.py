"""Packages that are known to go wrong together, whether a model is "paged" or not."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class KnownPair:
    """Versions of two packages that go wrong together.

    Attributes
    ----------
    package, other : str
        Their distributions.
    versions, other_versions : SpecifierSet
        The versions concerned.
    trouble, remedy : str
        Clauses: what goes wrong, and what to do.
    """

    package: str
    versions: SpecifierSet
    other: str
    other_versions: SpecifierSet
    trouble: str
    remedy: str

    def line(self) -> tuple[str, str] | None:
        """A label and a sentence if both are installed in these versions; None if not."""
        try:
            found, other = version(self.package), version(self.other)
        except PackageNotFoundError:
            return None
        if not self.versions.contains(found, True) or not self.other_versions.contains(other, True):
            return None
        return self.package, f"{found} with {self.other} {other}: {self.trouble}. Remedy: {self.remedy}"


KNOWN_PAIRS = (
    KnownPair(
        "peft",
        SpecifierSet(">=0.21,<0.22"),
        "transformers",
        SpecifierSet(">=5.24"),
        "prefix tuning is ignored, and prompt tuning goes wrong with a cache, in dense models too and without an error",
        "install transformers<5.24, or a newer peft, where you use these",
    ),
)


def known_trouble() -> list[tuple[str, str]]:
    """Return a line for each known pair that is installed here."""
    return [line for pair in KNOWN_PAIRS if (line := pair.line()) is not None]
