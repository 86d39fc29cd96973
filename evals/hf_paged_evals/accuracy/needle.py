"""Needle in a haystack over depth and length, both backends on the same haystacks."""

from hf_paged_evals.accuracy import haystack
from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.generation import generate
from hf_paged_evals.accuracy.outcomes import describe
from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.statistics import PairedOutcomes
from hf_paged_evals.runner.task import Sample


class NeedleInHaystack:
    """Each cell of the grid has a number of its own to be found."""

    name = "needle"
    title = "Needle in a haystack"
    settings = {"lengths": [256, 512, 1024, 2048], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "new_tokens": 8}
    quick = {"lengths": [256, 512], "depths": [0.0, 0.5, 1.0]}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings, tokenizer = options.settings_of(self), load_tokenizer(options)
        lengths, depths = _grid(settings, options)
        source, texts = sources.texts(options)
        hay = _tokens(tokenizer, texts, max(lengths))
        if len(hay) < max(lengths):
            raise ValueError(f"{source} holds {len(hay)} tokens, the longest haystack needs {max(lengths)}")
        found = []
        for length in lengths:
            hidden = [haystack.needle(options.seed, length, depth) for depth in depths]
            prompts = [haystack.prompt(tokenizer, hay, one, length, depth) for one, depth in zip(hidden, depths)]
            payload = {"length": length, "depths": depths, "prompts": prompts, "new_tokens": settings["new_tokens"]}
            payload |= {"answers": [one.answer for one in hidden], "source": source}
            found.append(Sample(f"length {length}", payload))
        return found

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given, tokenizer = sample.payload, models.tokenizer
        prompts, length = given["prompts"], {"max_new_tokens": given["new_tokens"]}
        baseline = generate(models.baseline, tokenizer, prompts, 1, **length)
        with models.counting() as counts:
            backend = generate(models.backend, tokenizer, prompts, len(prompts), **length)
        rows = [
            {
                "length": given["length"],
                "depth": depth,
                "answer": answer,
                "baseline": tokenizer.decode(first, skip_special_tokens=True),
                "backend": tokenizer.decode(second, skip_special_tokens=True),
                "same": first == second,
            }
            for depth, answer, first, second in zip(given["depths"], given["answers"], baseline, backend)
        ]
        return {"rows": rows, "source": given["source"], "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        rows = [row for record in records for row in record["rows"]]
        found = {who: [row["answer"] in row[who] for row in rows] for who in ("baseline", "backend")}
        outcomes = PairedOutcomes.count(found["baseline"], found["backend"])
        words, figures, table, flags = describe("needles found", outcomes, options)
        reads, evidence, unread = pages(records, options)
        same = sum(row["same"] for row in rows)
        maps = [
            _heat_map(title, rows, [float(hit) for hit in found[who]])
            for title, who in (
                (f"Needle found, {options.baseline_name}", "baseline"),
                (f"Needle found, {options.backend_name}", "backend"),
            )
        ]
        return Section(
            self.name,
            self.title,
            f"{words} {same} of {len(rows)} answers are token for token the same.",
            figures=[*figures, Figure("answers equal", 100 * same / len(rows), "%", better="higher"), reads],
            tables=[table, _answers(rows, options), evidence],
            plots=maps,
            notes=[f"Hay: {records[0]['source']}. A needle is found if the answer contains its five-digit number."],
            flags=[*flags, *unread],
        )


def _grid(settings: dict, options: Options) -> tuple[list[int], list[float]]:
    lengths, depths = settings["lengths"], settings["depths"]
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"needle wants lengths in tokens and depths from 0 to 1; got {lengths} and {depths}")
    return lengths[: sources.cut(options, len(lengths))], depths


def _tokens(tokenizer, texts: list[str], count: int) -> list[int]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=not ids)["input_ids"]
        if len(ids) >= count:
            break
    return ids[:count]


def _heat_map(title: str, rows: list[dict], values: list[float]) -> Plot:
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    at = {(row["depth"], row["length"]): value for row, value in zip(rows, values)}
    return Plot(
        title,
        "heatmap",
        "context (tokens)",
        "depth (share of the context)",
        {"values": [[at[depth, length] for length in lengths] for depth in depths]},
        [str(length) for length in lengths],
        [f"{depth:.0%}" for depth in depths],
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _answers(rows: list[dict], options: Options) -> Table:
    columns = ["Context", "Depth", "Needle", options.baseline_name, options.backend_name]
    lines = [
        [row["length"], f"{row['depth']:.0%}", row["answer"], _one_line(row["baseline"]), _one_line(row["backend"])]
        for row in rows
    ]
    return Table("Answers", columns, lines)
