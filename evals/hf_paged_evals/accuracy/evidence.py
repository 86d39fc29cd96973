"""Evidence that a task went through the pages: what the backend's pool counted, summed over samples."""

from collections import Counter

from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Table


def pages(records: list[dict], options: Options) -> tuple[Figure, Table, list[str]]:
    """A figure, a table and flags about the ``"pages"`` of the records, which are `Counts` as dicts."""
    counts = [record["pages"] for record in records]
    reads = sum(count["page_reads"] for count in counts)
    rows: list[list[str | int]] = [
        ["attention calls that read pages", reads],
        ["packed calls of generate", sum(count["packed_calls"] for count in counts)],
        ["preemptions", sum(count["preemptions"] for count in counts)],
    ]
    for name, words in (("gathers", "gathers"), ("fallbacks", "calls in transformers' own loop")):
        total = sum((Counter(count[name]) for count in counts), Counter())
        rows += [[f"{words}: {reason}", number] for reason, number in sorted(total.items())]
    flags = []
    if options.backend == "paged" and reads == 0:
        flags.append("no attention call read pages: what was measured is a dense cache")
    return Figure("page reads", reads, "calls"), Table("Through the pages", ["What", "Times"], rows), flags
