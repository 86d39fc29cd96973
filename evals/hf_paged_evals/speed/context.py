"""Long context: one long prompt, the time to its first token, and the time of each further one."""

import time
from statistics import median

import torch

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair, name_of
from hf_paged_evals.models.tiny import VOCAB, tiny_config, tiny_model
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.arrivals import Clock
from hf_paged_evals.speed.contenders.interface import Lengths
from hf_paged_evals.speed.contenders.local import arguments
from hf_paged_evals.speed.timing import digest

_STAND_IN = "a tiny random llama"
_COLUMNS = ["Prompt (tokens)", "Model", "Contender", "To the first token (s)", "Each further token (ms)", "Same answer"]


class Context:
    """Dense and paged on one prompt. A tiny random model runs the prompts that are too long for the model."""

    name = "context"
    title = "Long context"
    settings = {"lengths": [6000, 32000], "new_tokens": 32, "repeats": 1}
    quick = {"lengths": [512, 16000], "new_tokens": 16}
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        return [
            Sample(
                f"{length} tokens, {name}, turn {turn}",
                {
                    "contender": name,
                    "turn": turn,
                    "length": length,
                    "new_tokens": given["new_tokens"],
                    "prompt": workloads.uniform(options, 1, length, seed=4)[0],
                },
            )
            for turn in range(given["repeats"])
            for length in given["lengths"]
            for name in ("dense", "paged")
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        ids, count = torch.tensor([given["prompt"]]), given["new_tokens"]
        limit = getattr(models.baseline.config.get_text_config(decoder=True), "max_position_embeddings", None)
        is_real = limit is None or ids.shape[1] + count <= limit
        if is_real:
            model = models.baseline if given["contender"] == "dense" else models.backend
        else:
            model, ids = _stand_in(models, given["contender"], ids.shape[1] + count), ids % VOCAB
        ids = ids.to(model.device)
        options = arguments(models, Lengths(count, stops=False)) | ({} if is_real else {"pad_token_id": 0})
        hf_paged.release(model)
        warm = ids[:, -16:]  # The prompt begins otherwise: nothing of it is stored.
        model.generate(warm, attention_mask=torch.ones_like(warm), **{**options, "max_new_tokens": 2})
        clock, began = Clock(), time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options, streamer=clock)
        gaps = [after - before for before, after in zip(clock.times, clock.times[1:])]
        return {
            "contender": given["contender"],
            "turn": given["turn"],
            "length": given["length"],
            "model": name_of(models.options) if is_real else _STAND_IN,
            "first": clock.times[0] - began,
            "each": median(gaps),
            "answer": digest(output[0, ids.shape[1] :].tolist()),
        }

    def summarise(self, records: list[dict], options: Options) -> Section:
        groups: dict[tuple[int, str], list[dict]] = {}
        for record in records:
            groups.setdefault((record["length"], record["contender"]), []).append(record)
        seen = {
            key: {what: median(one[what] for one in some) for what in ("first", "each")} for key, some in groups.items()
        }
        figures = []
        for length in dict.fromkeys(record["length"] for record in records):
            dense, paged = seen[length, "dense"], seen[length, "paged"]
            figures += [
                Figure(f"{length} tokens: to the first token, paged", paged["first"], "s", better="lower"),
                Figure(f"{length} tokens: each further token, paged", 1000 * paged["each"], "ms", better="lower"),
                Figure(
                    f"{length} tokens: prefill, dense over paged", dense["first"] / paged["first"], "x", better="higher"
                ),
                Figure(
                    f"{length} tokens: decode, dense over paged", dense["each"] / paged["each"], "x", better="higher"
                ),
            ]
        return Section(
            self.name,
            self.title,
            _summary(seen),
            figures,
            [_table(groups, seen)],
            [_plot(seen, "each", 1000, "Each further token", "time a token (ms)")],
            [
                f"{_STAND_IN[0].upper()}{_STAND_IN[1:]} stands in where the prompt is longer than the model's "
                "positions: 2 layers, 4 heads of 16, 2 of them with keys and values. Its times say nothing of larger "
                "models; its ratio is one of attention alone.",
                "Random tokens, one row, greedy.",
            ],
        )


def _stand_in(models: ModelPair, contender: str, positions: int):
    config = tiny_config("llama", max_position_embeddings=positions)
    implementation = models.options.baseline if contender == "dense" else models.options.backend
    model = tiny_model(config, implementation, getattr(torch, models.options.dtype))
    if implementation == "paged":
        hf_paged.configure(model, models.options.paged_config())
    return model


def _table(groups: dict, seen: dict) -> Table:
    rows = []
    for (length, name), records in groups.items():
        times = seen[length, name]
        same = all(one["answer"] == groups[length, "dense"][0]["answer"] for one in records)
        rows.append([length, records[0]["model"], name, times["first"], 1000 * times["each"], same])
    return Table("By length of the prompt", _COLUMNS, rows)


def _plot(seen: dict, what: str, factor: float, title: str, label: str) -> Plot:
    lengths = list(dict.fromkeys(length for length, _ in seen))
    series = {
        name: [[place, factor * seen[length, name][what]] for place, length in enumerate(lengths)]
        for name in ("dense", "paged")
    }
    return Plot(title, "bar", "prompt (tokens)", label, series, [f"{length:,}" for length in lengths])


def _summary(seen: dict) -> str:
    parts = []
    for length in dict.fromkeys(length for length, _ in seen):
        dense, paged = seen[length, "dense"], seen[length, "paged"]
        parts.append(
            f"after {length:,} tokens paged's prefill is {dense['first'] / paged['first']:.2f} and its decode "
            f"{dense['each'] / paged['each']:.2f} times as fast as dense's"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
