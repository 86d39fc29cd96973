"""Pages of the documentation that hold a table made by a program, between two marks."""

from pathlib import Path


def find_page(name: str) -> Path:
    """The page ``docs/<name>`` of the checkout that this module lies in.

    Raises
    ------
    FileNotFoundError
        If it does not lie in a checkout.
    """
    for folder in Path(__file__).resolve().parents:
        page = folder / "docs" / name
        if page.exists():
            return page
    raise FileNotFoundError(f"there is no docs/{name} above {Path(__file__).name}: run the command in a checkout")


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between ``<!-- name -->`` and ``<!-- /name -->``, in place of what was there.

    Raises
    ------
    ValueError
        If the marks are not there in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page must hold {begin} and, after it, {end}: the table goes between them")
    return f"{before}{begin}\n{table}\n{end}{after}"


def rewrite(name: str, table: str, page: Path) -> None:
    """Put `table` between the marks of that name on `page`."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), name, table), encoding="utf-8")
