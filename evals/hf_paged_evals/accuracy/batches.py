"""Batch invariance: a prompt alone should get the tokens that it gets among others."""

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.generation import first_difference, forced_length, generate
from hf_paged_evals.accuracy.near_ties import judge
from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.statistics import proportion
from hf_paged_evals.runner.task import Sample


class BatchInvariance:
    """Each prompt runs alone and in batches of several sizes, on both backends."""

    name = "batch"
    title = "Batch invariance"
    settings = {"humaneval": 16, "sharegpt": 16, "sizes": [2, 8, 32], "probes": 8, "new_tokens": 32, "max_prompt": 256}
    quick = {"humaneval": 2, "sharegpt": 6, "sizes": [8], "probes": 4, "new_tokens": 8, "max_prompt": 64}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings = options.settings_of(self)
        prompts = sources.prompts(
            load_tokenizer(options), options, settings["humaneval"], settings["sharegpt"], settings["max_prompt"]
        )
        names = list(prompts)
        sizes = [size for size in settings["sizes"] if size <= len(names)]
        if not sizes:
            raise ValueError(f"batches of {settings['sizes']} want more than {len(names)} prompts: raise --limit")
        return [
            Sample(f"probes {number}", {**settings, "sizes": sizes, "probes": some, "prompts": prompts})
            for number, some in enumerate(sources.batches(names, settings["probes"]))
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        baseline = _run(models, models.baseline, sample.payload)
        with models.counting() as counts:
            backend = _run(models, models.backend, sample.payload)
        return {"baseline": baseline, "backend": backend, "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        names = {"baseline": options.baseline_name, "backend": options.backend_name}
        sizes = sorted({row["size"] for record in records for row in record["backend"]})
        reads, evidence, flags = pages(records, options)
        figures, lines, series = [], [], {}
        for who, name in names.items():
            rows = [row for record in records for row in record[who]]
            series[name] = []
            for size in sizes:
                some = [row for row in rows if row["size"] == size]
                parted = [row for row in some if row["at"] is not None]
                unexplained = sum(not row["is_near_tie"] for row in parted)
                share = proportion(len(some) - len(parted), len(some)).times(100)
                figures.append(Figure(f"as alone in {size}, {name}", share.value, "%", share.low, share.high, "higher"))
                lines.append([name, size, len(some), len(some) - len(parted), len(parted) - unexplained, unexplained])
                series[name].append([size, share.value])
                if unexplained and who == "backend":
                    flags.append(f"{unexplained} of {len(some)} rows change in a batch of {size} without a near-tie")
        equal = {who: sum(row["at"] is None for record in records for row in record[who]) for who in names}
        total = sum(len(record["backend"]) for record in records)
        return Section(
            self.name,
            self.title,
            f"In batches of {', '.join(map(str, sizes))}, {equal['backend']} of {total} rows keep the tokens they get "
            f"alone with {options.backend_name}, {equal['baseline']} with {options.baseline_name}.",
            figures=[*figures, reads],
            tables=[
                Table("By batch", ["Backend", "Batch", "Rows", "As alone", "Near-ties", "Unexplained"], lines),
                evidence,
            ],
            plots=[Plot("Rows that keep their tokens", "line", "batch (rows)", "rows as alone (%)", series)],
            notes=["Rows of a batch differ in length and are padded on the left; the others are further prompts."],
            flags=flags,
        )


def _run(models: ModelPair, model, given: dict) -> list[dict]:
    """Each probe in each batch size against the same probe alone."""
    prompts, length = given["prompts"], forced_length(given["new_tokens"])
    probes = given["probes"]
    alone = dict(zip(probes, generate(model, models.tokenizer, [prompts[name] for name in probes], 1, **length)))
    others = [name for name in prompts if name not in alone]
    rows = []
    for size in given["sizes"]:
        # Probes fill the batches; where they do not suffice, other prompts do.
        names = [*probes, *others[: max(0, size - len(probes))]]
        found = generate(model, models.tokenizer, [prompts[name] for name in names], size, **length)
        for name, tokens in zip(probes, found):
            at = first_difference(alone[name], tokens)
            divergence = None if at is None else judge(models, prompts[name], alone[name], tokens, at)
            is_near_tie = None if at is None else divergence is not None and divergence.is_near_tie
            rows.append({"name": name, "size": size, "at": at, "is_near_tie": is_near_tie})
    return rows
