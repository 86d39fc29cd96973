"""The pages that hold published figures, in a checkout: tables stand between two marks."""

from dataclasses import dataclass
from pathlib import Path

from hf_paged_evals.figures import tables

RESULTS = Path("evals", "results")
README, BENCHMARKS, MODELS = Path("README.md"), Path("docs", "benchmarks.md"), Path("docs", "models.md")


@dataclass(frozen=True)
class Checkout:
    """A checkout of the repository, or a copy of its pages and results.

    Attributes
    ----------
    root : Path
        Holds README.md, docs/ and evals/results/.
    """

    root: Path

    @property
    def results(self) -> Path:
        return self.root / RESULTS

    def rewritten(self) -> dict[Path, str]:
        """The text of every page with its tables made anew, by its path.

        Raises
        ------
        ValueError
            If a page has no marks, or a row neither results nor a line that stands there.
        """
        readme, benchmarks, models = (
            (self.root / page).read_text(encoding="utf-8") for page in (README, BENCHMARKS, MODELS)
        )
        readme = with_table(readme, "figures", tables.readme_table(table_in(readme, "figures"), self.results))
        speed = tables.benchmarks_table(table_in(benchmarks, "speed"), self.results)
        benchmarks = with_table(benchmarks, "speed", speed)
        benchmarks = with_table(benchmarks, "accuracy", tables.accuracy_tables(self.results))
        types = tables.model_types_table(table_in(models, "model-types"), self.results)
        models = with_table(models, "model-types", types)
        return {self.root / README: readme, self.root / BENCHMARKS: benchmarks, self.root / MODELS: models}

    def rewrite(self) -> list[Path]:
        """Write the pages whose tables have changed; returns them. Raises as `rewritten` does."""
        changed = {page: text for page, text in self.rewritten().items() if page.read_text(encoding="utf-8") != text}
        for page, text in changed.items():
            page.write_text(text, encoding="utf-8")
        return list(changed)


def own_checkout() -> Checkout | None:
    """The checkout that this module lies in; None if it was installed from a wheel."""
    for folder in Path(__file__).resolve().parents:
        if (folder / RESULTS).is_dir() and (folder / BENCHMARKS).is_file():
            return Checkout(folder)
    return None


def table_in(text: str, name: str) -> str:
    """The text between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises
    ------
    ValueError
        If the marks are not there in this order.
    """
    _, _, inside, _, _ = _parts(text, name)
    return inside.strip("\n")


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks of that name, in place of what was there. Raises as `table_in` does."""
    before, begin, _, end, after = _parts(text, name)
    return f"{before}{begin}\n{table}\n{end}{after}"


def _parts(text: str, name: str) -> tuple[str, str, str, str, str]:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    inside, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page must hold {begin} and, after it, {end}: the table goes between them")
    return before, begin, inside, end, after
