"""Perplexity over sliding windows, and its paired difference."""

import math

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.windows import Window, losses, windows
from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.statistics import Estimate, bootstrap_ratio
from hf_paged_evals.runner.task import Sample


class Perplexity:
    """Each token of a text is scored once, with at least ``length - stride`` tokens before it."""

    name = "perplexity"
    title = "Perplexity"
    settings = {"length": 512, "stride": 256, "windows": 64, "chunk": 128, "batch": 4, "margin": 1e-3}
    quick = {"length": 256, "stride": 128, "windows": 8}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings = options.settings_of(self)
        length, stride, chunk = settings["length"], settings["stride"], settings["chunk"]
        if not 0 < stride <= length or not 0 < chunk <= length - stride:
            raise ValueError(
                f"perplexity wants 0 < stride <= length and 0 < chunk <= length - stride, so that what is scored reads "
                f"the cache; got length {length}, stride {stride}, chunk {chunk}"
            )
        source, texts = sources.texts(options)
        found = _windows(load_tokenizer(options), texts, length, stride, sources.cut(options, settings["windows"]))
        if not found:
            raise ValueError(f"{source} holds no window of {length} tokens: set perplexity.length lower")
        return [
            Sample(f"windows {number}", {"windows": some, "chunk": chunk, "source": source})
            for number, some in enumerate(sources.batches(found, settings["batch"]))
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        batch, chunk = sample.payload["windows"], sample.payload["chunk"]
        baseline = losses(models.baseline, batch, chunk)
        with models.counting() as counts:
            backend = losses(models.backend, batch, chunk)
        rows = [
            {
                "tokens": len(first),
                "baseline": float(first.sum()),
                "backend": float(second.sum()),
                "largest": float((first - second).abs().max()),
            }
            for first, second in zip(baseline, backend)
        ]
        return {"rows": rows, "source": sample.payload["source"], "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        rows = [row for record in records for row in record["rows"]]
        reads, table, flags = pages(records, options)
        finite = [row for row in rows if math.isfinite(row["backend"]) and math.isfinite(row["baseline"])]
        if len(finite) < len(rows):
            flags.append(f"the likelihood is not finite in {len(rows) - len(finite)} of {len(rows)} windows")
        settings, source = options.settings_of(self), records[0]["source"]
        notes = [
            f"Text: {source}. Windows of {settings['length']} tokens every {settings['stride']}, through the "
            f"cache {settings['chunk']} tokens at a time; both backends get the same calls.",
            f"Flagged if the interval excludes 0 and the difference is more than {settings['margin']:g} nats/token.",
        ]
        if not finite:
            return Section(self.name, self.title, "No window is finite.", [reads], [table], notes=notes, flags=flags)
        tokens = [row["tokens"] for row in finite]
        baseline, backend = (
            bootstrap_ratio([row[name] for row in finite], tokens, options.seed) for name in ("baseline", "backend")
        )
        change = bootstrap_ratio([row["backend"] - row["baseline"] for row in finite], tokens, options.seed)
        if not change.contains_zero and abs(change.value) > settings["margin"]:
            flags.append(f"the backend is {change.value:+.3g} nats/token off the baseline")
        figures = [
            _perplexity(options.baseline_name, baseline),
            _perplexity(options.backend_name, backend),
            Figure("paired difference", change.value, "nats/token", change.low, change.high, "lower"),
            Figure("largest difference of one token", max(row["largest"] for row in finite), "nats", better="lower"),
            reads,
        ]
        return Section(
            self.name,
            self.title,
            f"{math.exp(baseline.value):.4f} with {options.baseline_name}, {math.exp(backend.value):.4f} with "
            f"{options.backend_name}; the paired difference is {change.value:+.1e} nats/token, 95 % interval "
            f"{change.low:+.1e} to {change.high:+.1e} (half-width {change.half_width:.1e}).",
            figures=figures,
            tables=[_totals(finite), table],
            plots=[_by_window(finite)],
            notes=notes,
            flags=flags,
        )


def _windows(tokenizer, texts: list[str], length: int, stride: int, count: int) -> list[Window]:
    """The first windows of all texts as one, read no further than need be."""
    needed, ids = length + stride * (count - 1), []
    for number, text in enumerate(texts):
        ids += tokenizer(text if number == 0 else "\n\n" + text)["input_ids"]
        if len(ids) >= needed:
            break
    return list(windows(ids[:needed], length, stride))


def _perplexity(name: str, loss: Estimate) -> Figure:
    return Figure(f"perplexity, {name}", math.exp(loss.value), "", math.exp(loss.low), math.exp(loss.high), "lower")


def _totals(rows: list[dict]) -> Table:
    total = [sum(row["tokens"] for row in rows), *(sum(row[name] for row in rows) for name in ("baseline", "backend"))]
    return Table("Totals", ["Windows", "Scored tokens", "Baseline (nats)", "Backend (nats)"], [[len(rows), *total]])


def _by_window(rows: list[dict]) -> Plot:
    points = [[at, (row["backend"] - row["baseline"]) / row["tokens"]] for at, row in enumerate(rows)]
    return Plot("Difference by window", "line", "window", "backend - baseline (nats/token)", {"windows": points})
