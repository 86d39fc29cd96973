"""Hooks of MkDocs: pages that are made when the site is built, so that no generated text is committed.

* The page on troubleshooting gets a table of every `Reason`, with its remedy.
* CONTRIBUTING.md, SECURITY.md and CHANGELOG.md, which lie above this folder, become pages. Their links, and those
  of the pages here to them, are written as they are true in the repository, and are rewritten for the site.

``python docs/hooks.py`` prints the tables of reasons.
"""

import re
from pathlib import Path

from hf_paged.reasons import Reason

# Calls, dotted names and names with an underscore, with the value that they are set to.
_CODE = re.compile(
    r"""(?:\([^()]*\)\.)?[A-Za-z_][\w.]*\([^()]*\)|(?:[A-Za-z]\w*(?:\.\w+)+|[A-Za-z]+_\w+)(?: ?= ?(?:"\w+"|\w+))?"""
)
ROOT = Path(__file__).resolve().parent.parent
REASONS_MARK = "<!-- reasons -->"
PROJECT_PAGES = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
# The first reason of each part of the enum, the heading of that part, and the consequence that its reasons share.
PARTS = {
    Reason.TRAINING: (
        "Calls that are not packed",
        "`generate` ran transformers' own loop for this call, over the paged cache where it has one. Its rows were not "
        "packed with those of other calls. Counted in `stats(model).fallbacks`.",
    ),
    Reason.NO_POOL: (
        "Models that are not packed",
        "No packed step serves the model, so every call runs transformers' own loop. A packed step is tried again when "
        "the model changes, and now and then without that. Counted in `stats(model).fallbacks`.",
    ),
    Reason.APPLIED_OPERATION: (
        "Keys and values that are gathered",
        "An attention call got a dense copy of the keys and values that lie in the pages, and computed what `sdpa` or "
        "`eager` would. The memory saved by pages stays saved; the copy takes time. Counted in `stats(model).gathers`.",
    ),
    Reason.CACHE_READ: (
        "Layers that became dense",
        "The cache was used in a way that pages do not serve. Its keys and values were copied out of the pages, and "
        "the layer went on as transformers' own dense one. Counted in `stats(model).gathers` where states were copied.",
    ),
    Reason.OWN_FORWARD: (
        "Pipeline items that run in turn",
        "A text-generation pipeline ran its items one after another, as transformers does. The results are the same. "
        "Counted in `stats(model).pipelines_in_turn`.",
    ),
    Reason.PROMPT_TOKENS: (
        "Steps that run eagerly",
        "A packed step ran the model's Python code, though decode steps of the model are "
        "[captured](configuration.md#captured-steps). Counted in `stats(model).eager_steps`.",
    ),
    Reason.OTHER_MODEL: (
        "Captured steps that are dropped",
        "What a captured step holds was no longer so, or its memory was asked for. "
        "Counted in `stats(model).dropped_captures`.",
    ),
}


def on_files(files, config):
    """Add the pages that lie above the folder of the documentation."""
    from mkdocs.structure.files import File

    for source, page in PROJECT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Fill in the table of reasons, and turn links into those of the site."""
    uri = page.file.src_uri
    if uri == "troubleshooting.md":
        if markdown.count(REASONS_MARK) != 1:
            raise ValueError(f"{uri} must hold {REASONS_MARK} once: the tables of reasons take its place")
        markdown = markdown.replace(REASONS_MARK, reason_tables())
    return project_links(markdown) if uri in PROJECT_PAGES.values() else page_links(markdown)


def project_links(markdown: str) -> str:
    """The links of a file in the repository's root as links of the site."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    for source, page in {**PROJECT_PAGES, "README.md": "index.md"}.items():
        markdown = re.sub(rf"\]\({re.escape(source)}(?=[)#])", f"]({page}", markdown)
    return markdown


def page_links(markdown: str) -> str:
    """The links of a page to files in the repository's root as links of the site."""
    for source, page in {**PROJECT_PAGES, "README.md": "index.md"}.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(source)}(?=[)#])", f"]({page}", markdown)
    return markdown


def reason_tables() -> str:
    """Every reason with its remedy, as one Markdown table per part of the enum.

    Raises
    ------
    ValueError
        If a reason has no remedy, or comes before the first part.
    """
    lines: list[str] = []
    for reason in Reason:
        if reason in PARTS:
            title, consequence = PARTS[reason]
            lines += ["", f"### {title}", "", consequence, "", "| Reason | Remedy | Log |", "|---|---|---|"]
        if not lines:
            raise ValueError(f"{reason.name} comes before the first part: name the part of the first reason in PARTS")
        if not reason.remedy.strip():
            raise ValueError(f"{reason.name} has no remedy: a reader of this page has nothing to do about it")
        lines.append(reason_row(reason))
    return "\n".join(lines).strip()


def reason_row(reason: Reason) -> str:
    """One line of the table. ``...`` in a reason's text stands for a name that the log fills in."""
    text = reason.text.replace("...", "…")
    level = "info" if reason.is_expected else "warning"
    return f"| {_cell(text)} | {_cell(_sentence(reason.remedy))} | {level} |"


def _sentence(remedy: str) -> str:
    """A remedy as a sentence: a capital first, unless it begins with code, and a full stop."""
    is_code = _CODE.match(remedy) is not None
    return f"{remedy if is_code else remedy[0].upper() + remedy[1:]}."


def _cell(text: str) -> str:
    """Text of a table's cell, with what looks like Python in code font."""
    return _CODE.sub(r"`\g<0>`", text.replace("|", "\\|"))


if __name__ == "__main__":
    print(reason_tables())
