"""Exact greedy match: rows in which both backends generate the same tokens, and the first divergence of the others."""

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.generation import first_difference, forced_length, generate
from hf_paged_evals.accuracy.near_ties import judge
from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.statistics import proportion
from hf_paged_evals.runner.task import Sample


class GreedyMatch:
    """Rows of fixed length from real prompts, compared token by token."""

    name = "greedy"
    title = "Exact greedy match"
    settings = {
        "humaneval": 164,
        "sharegpt": 64,
        "new_tokens": 64,
        "max_prompt": 512,
        "batch": 32,
        "baseline_batch": 8,
    }
    quick = {"humaneval": 4, "sharegpt": 4, "new_tokens": 16}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings = options.settings_of(self)
        counts = settings["humaneval"], settings["sharegpt"], settings["max_prompt"]
        prompts = sources.prompts(load_tokenizer(options), options, *counts)
        return [
            Sample(f"prompts {number}", {**settings, "prompts": dict(some)})
            for number, some in enumerate(sources.batches(list(prompts.items()), settings["batch"]))
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        prompts, length = list(given["prompts"].values()), forced_length(given["new_tokens"])
        baseline = generate(models.baseline, models.tokenizer, prompts, given["baseline_batch"], **length)
        with models.counting() as counts:
            backend = generate(models.backend, models.tokenizer, prompts, given["batch"], **length)
        rows = [
            _compare(models, name, prompt, first, second)
            for (name, prompt), first, second in zip(given["prompts"].items(), baseline, backend)
        ]
        return {"rows": rows, "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        rows = [row for record in records for row in record["rows"]]
        length = options.settings_of(self)["new_tokens"]
        parted = [row for row in rows if row["at"] is not None]
        unexplained = [row for row in parted if not row["is_near_tie"]]
        reads, table, flags = pages(records, options)
        if unexplained:
            flags.append(f"{len(unexplained)} of {len(rows)} rows part where rounding does not explain it")
        matches = proportion(len(rows) - len(parted), len(rows)).times(100)
        same = sum(length if row["at"] is None else row["at"] for row in rows) / (length * len(rows))
        share = f"{len(rows) - len(parted)} of {len(rows)} rows of {length} tokens are equal"
        why = (
            f"; of the {len(parted)} that part, {len(parted) - len(unexplained)} do so at a near-tie" if parted else ""
        )
        return Section(
            self.name,
            self.title,
            f"{share}{why}.",
            figures=[
                Figure("rows equal", matches.value, "%", matches.low, matches.high, "higher"),
                Figure("tokens before the first divergence", 100 * same, "%", better="higher"),
                Figure("divergences that rounding does not explain", len(unexplained), "rows", better="lower"),
                reads,
            ],
            tables=[*_by_source(rows), *_divergences(parted), table],
            plots=[_survival(rows, length)],
            notes=[
                "A divergence is a near-tie if, in float64, the less likely of the two chosen tokens lies below the "
                "likeliest by no more than twice the baseline's own largest logit error at that place.",
                "The task batch says how often the baseline alone changes its tokens with the size of its batches.",
            ],
            flags=flags,
        )


def _compare(models: ModelPair, name: str, prompt: list[int], baseline: list[int], backend: list[int]) -> dict:
    at = first_difference(baseline, backend)
    row = {"name": name, "prompt_tokens": len(prompt), "at": at, "is_near_tie": None}
    divergence = None if at is None else judge(models, prompt, baseline, backend, at)
    if at is not None:
        row["is_near_tie"] = divergence is not None and divergence.is_near_tie
    return row if divergence is None else {**row, **vars(divergence)}


def _by_source(rows: list[dict]) -> list[Table]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["name"].rpartition(" ")[0], []).append(row)
    lines = [
        [source, len(some), sum(row["prompt_tokens"] for row in some), sum(row["at"] is None for row in some)]
        for source, some in found.items()
    ]
    return [Table("By source of the prompts", ["Source", "Rows", "Prompt tokens", "Rows equal"], lines)]


def _divergences(rows: list[dict]) -> list[Table]:
    if not rows:
        return []
    lines = [
        [row["name"], row["at"], *(row.get(key, "one row ended") for key in ("margin", "gap", "error"))]
        + ["yes" if row["is_near_tie"] else "NO"]
        for row in rows
    ]
    columns = ["Prompt", "Token", "Top-2 margin", "Gap of the chosen", "Baseline's error", "Near-tie"]
    return [Table("First divergences", columns, lines, "Logits; margin and gap are of the model in float64.")]


def _survival(rows: list[dict], length: int) -> Plot:
    ends = [length if row["at"] is None else row["at"] for row in rows]
    points = [[step, 100 * sum(end >= step for end in ends) / len(ends)] for step in range(length + 1)]
    return Plot("Rows still equal", "line", "new tokens", "rows equal so far (%)", {"backend": points})
