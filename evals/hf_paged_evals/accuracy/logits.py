"""Teacher-forced logits: distances of the backend's from the baseline's and from float64, step by step."""

import torch

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.forcing import exact_logits, forced_logits
from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.statistics import bootstrap_mean, bootstrap_ratio
from hf_paged_evals.runner.task import Sample

_TOO_MUCH = 3.0  # Times the baseline's own error.


class ForcedLogits:
    """Both backends decode the same given tokens; a float64 forward says what the logits should have been."""

    name = "logits"
    title = "Teacher-forced logits"
    settings = {"humaneval": 16, "sharegpt": 16, "steps": 32, "max_prompt": 512, "batch": 8}
    quick = {"humaneval": 4, "sharegpt": 4, "steps": 16}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings = options.settings_of(self)
        steps = settings["steps"]
        found = sources.prompts(
            load_tokenizer(options), options, settings["humaneval"], settings["sharegpt"], settings["max_prompt"]
        )
        rows = [(name, ids) for name, ids in found.items() if len(ids) > steps]
        return [
            Sample(f"rows {number}", {"rows": dict(some), "steps": steps})
            for number, some in enumerate(sources.batches(rows, settings["batch"]))
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        steps, rows = sample.payload["steps"], list(sample.payload["rows"].values())
        baseline = forced_logits(models.baseline, models.tokenizer, rows, steps)
        with models.counting() as counts:
            backend = forced_logits(models.backend, models.tokenizer, rows, steps)
        found = [
            {"name": name, **_compare(first.double(), second.double(), exact_logits(models.exact, ids, steps))}
            for name, ids, first, second in zip(sample.payload["rows"], rows, baseline, backend)
        ]
        return {"rows": found, "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        rows = [row for record in records for row in record["rows"]]
        reads, table, flags = pages(records, options)
        broken = [row["name"] for row in rows if not row["finite"]]
        rows = [row for row in rows if row["finite"]]
        if broken:
            flags.append(f"logits are not finite in {len(broken)} rows, such as {broken[0]}")
        figures = [reads]
        if rows:
            ratio = bootstrap_ratio(_means(rows, "backend_error"), _means(rows, "baseline_error"), options.seed)
            flags += _excesses(rows)
            figures = [*_figures(rows, ratio, options.seed), reads]
        largest = max((max(row["difference"]) for row in rows), default=float("nan"))
        words = [f"The largest difference of a logit is {largest:.2e}"] if rows else ["No row has finite logits"]
        words += [f"the backend's error against float64 is {ratio.value:.3g} times the baseline's"] if rows else []
        return Section(
            self.name,
            self.title,
            "; ".join(words) + ".",
            figures=figures,
            tables=[_by_row(rows), table],
            plots=_plots(rows) if rows else [],
            notes=[
                "Rows of a batch differ in length and are padded on the left. Errors are the mean over the vocabulary "
                "of |logit - float64 logit|; the divergence is KL(baseline, backend) in float64.",
                f"A row is flagged if it errs more than {_TOO_MUCH:g} times as much as with the baseline.",
            ],
            flags=flags,
        )


def _compare(baseline: torch.Tensor, backend: torch.Tensor, exact: torch.Tensor) -> dict:
    """Per step, of logits ``[steps, vocab]`` in float64."""
    if not (backend.isfinite().all() and baseline.isfinite().all()):
        return {"finite": False}
    first, second = baseline.log_softmax(-1), backend.log_softmax(-1)
    return {
        "finite": True,
        "difference": (baseline - backend).abs().amax(-1).tolist(),
        "divergence": (first.exp() * (first - second)).sum(-1).clamp(min=0).tolist(),
        "same_top": (baseline.argmax(-1) == backend.argmax(-1)).tolist(),
        "baseline_error": (baseline - exact).abs().mean(-1).tolist(),
        "backend_error": (backend - exact).abs().mean(-1).tolist(),
    }


def _excesses(rows: list[dict]) -> list[str]:
    """Row by row: an error that hits a few of many rows would be lost in the mean."""
    pairs = zip(_means(rows, "backend_error"), _means(rows, "baseline_error"))
    worst = [backend / max(baseline, 1e-300) for backend, baseline in pairs if backend > _TOO_MUCH * baseline]
    if not worst:
        return []
    return [f"{len(worst)} of {len(rows)} rows err up to {max(worst):.3g} times as much as with the baseline"]


def _means(rows: list[dict], name: str) -> list[float]:
    return [sum(row[name]) / len(row[name]) for row in rows]


def _figures(rows: list[dict], ratio, seed: int) -> list[Figure]:
    divergence, top = bootstrap_mean(_means(rows, "divergence"), seed), bootstrap_mean(_means(rows, "same_top"), seed)
    top = top.times(100)
    largest = max(max(row["difference"]) for row in rows)
    return [
        Figure("largest difference of a logit", largest, "logits", better="lower"),
        Figure("mean KL divergence", divergence.value, "nats/token", divergence.low, divergence.high, "lower"),
        Figure("same likeliest token", top.value, "% of steps", top.low, top.high, "higher"),
        Figure("error, backend / baseline", ratio.value, "ratio", ratio.low, ratio.high, "lower"),
    ]


def _by_row(rows: list[dict]) -> Table:
    columns = ["Row", "Largest difference", "Mean KL", "Baseline's error", "Backend's error"]
    names = ("divergence", "baseline_error", "backend_error")
    lines = [
        [row["name"], max(row["difference"]), *(sum(row[name]) / len(row[name]) for name in names)] for row in rows
    ]
    return Table("By row", columns, lines, "Logits; KL in nats/token.")


def _plots(rows: list[dict]) -> list[Plot]:
    steps = range(len(rows[0]["difference"]))
    largest = [[step, max(row["difference"][step] for row in rows)] for step in steps]
    divergence = [[step, sum(row["divergence"][step] for row in rows) / len(rows)] for step in steps]
    return [
        Plot("Largest difference by step", "line", "decode step", "|difference| (logits)", {"all rows": largest}),
        Plot("Mean KL divergence by step", "line", "decode step", "KL (nats/token)", {"all rows": divergence}),
    ]
