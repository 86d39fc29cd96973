"""The table of the PagedAttention paper, reproduced: waste, and what sharing saves."""

from hf_paged_evals.report.text import NONE
from hf_paged_evals.suite.models import Models
from hf_paged_evals.suite.options import Options
from hf_paged_evals.suite.task import Figure, Sample, Section, Table

from . import workloads
from .contenders import Lengths, contender
from .contenders.local import arguments, padded
from .observe import observed
from .paper_figures import dense_share, rows_beside_paper
from .timing import fresh_pool, prefix_hits, rate, ratio, timed

_COLUMNS = ["What", "The paper", "Here"]


class Paper:
    """Shares of memory from the pool at every step; the throughput of shared prefixes from timed turns."""

    name = "paper"
    title = "The paper's table, reproduced"
    settings = {
        **{"waste_prompts": 32, "waste_new_tokens": 128, "max_prompt": 1024},
        **{"prompts": 4, "rows": [2, 4, 6], "new_tokens": 338, "short_prompt": 56, "short_new_tokens": 58},
        **{"prefix_prompts": 16, "own_tokens": 32, "prefix_new_tokens": 32, "repeats": 3},
    }
    quick = {
        **{"waste_prompts": 6, "waste_new_tokens": 16, "max_prompt": 64},
        **{"prompts": 1, "rows": [4], "new_tokens": 16, "short_new_tokens": 8},
        **{"prefix_prompts": 3, "prefix_new_tokens": 4, "repeats": 1},
    }
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        prompts = workloads.ragged(options, given["waste_prompts"], given["max_prompt"])
        waste = {"kind": "waste", "prompts": prompts, "warm": workloads.warming(prompts, options)}
        waste["lengths"] = Lengths(given["waste_new_tokens"])
        return [Sample("waste", waste), *_sharing(options, given), *_prefixes(options, given)]

    def run(self, sample: Sample, models: Models) -> dict:
        return _RUN[sample.payload["kind"]](sample.payload, models)

    def summarise(self, records: list[dict], options: Options) -> Section:
        given = options.settings_of(self)
        of = {kind: [record for record in records if record["kind"] == kind] for kind in _RUN}
        (waste,) = of["waste"]
        groups = _by_prefix(of["prefix speed"])
        gains = {
            (shots, name): ratio(groups[shots, "dense"], some, what="requests")
            for (shots, name), some in groups.items()
            if name != "dense"
        }
        figures = [
            Figure("KV memory that holds tokens, dense", 100 * waste["dense"], "%", better="higher"),
            Figure("KV memory that holds tokens, paged", 100 * waste["paged"], "%", better="higher"),
        ]
        figures += [
            Figure(
                f"saved, {one['mode']}, {one['rows']} rows, {one['workload']} prompts",
                100 * one["saving"],
                "%",
                better="higher",
            )
            for one in of["sharing"]
            if one["rows"] == max(other["rows"] for other in of["sharing"])
        ]
        figures += [
            Figure(f"{shots} prefix: {name}, over dense", gain.value, "x", gain.low, gain.high, "higher")
            for (shots, name), gain in gains.items()
        ]
        beside = rows_beside_paper(waste, of["sharing"], of["prefix memory"], gains)
        return Section(
            self.name,
            self.title,
            f"{100 * waste['paged']:.1f} % of the KV memory in use holds tokens, where the paper says 96 %; "
            f"dense {100 * waste['dense']:.0f} %, where it says 20 to 38 %.",
            figures,
            [
                Table(
                    "Beside the paper's figures", _COLUMNS, beside, "Kwon et al., SOSP 2023; its blocks hold 16 tokens."
                ),
                _sharing_table(of["sharing"]),
                _prefix_table(groups),
            ],
            [],
            [
                f"Blocks of {options.block_size} tokens. Saving = blocks saved by sharing / blocks without sharing, "
                "over all steps. Waste: mean over all steps.",
                "Dense memory that holds tokens: of its rectangle of rows and positions, which keeps finished rows. "
                "The paper's systems reserved room for the longest answer besides.",
                "The paper's prefixes are stored before, its factors are over Orca, on a GPU. Here they are over dense "
                "with all requests in one batch, with the prefix stored before and without.",
                "The paper's traces are ShareGPT (161 tokens in, 338 out on average) and Alpaca (19 in, 58 out). Here: "
                f"{workloads.source(options)}, and the short ones among them, with {given['new_tokens']} and "
                f"{given['short_new_tokens']} new tokens.",
            ],
        )


def _sharing(options: Options, given: dict) -> list[Sample]:
    kinds = {
        "all": (given["max_prompt"], given["new_tokens"]),
        "short": (given["short_prompt"], given["short_new_tokens"]),
    }
    found = []
    for workload, (most, new_tokens) in kinds.items():
        prompts = workloads.ragged(options, given["prompts"], most)
        for rows in given["rows"]:
            for mode in ("samples", "beams"):
                payload = {"kind": "sharing", "workload": workload, "mode": mode, "rows": rows, "prompts": prompts}
                payload |= {"lengths": Lengths(new_tokens, stops=False), "warm": workloads.warming(prompts, options)}
                found.append(Sample(f"{workload}, {rows} {mode}", payload))
    return found


def _prefixes(options: Options, given: dict) -> list[Sample]:
    found = []
    for turn in range(given["repeats"]):
        for shots, prefix in workloads.SHOTS.items():
            prompts = workloads.shared_prefix(options, given["prefix_prompts"], prefix, given["own_tokens"])
            payload = {"shots": shots, "turn": turn, "prompts": prompts, "warm": workloads.warming(prompts, options)}
            payload |= {"prefix": prompts[0][:prefix], "lengths": Lengths(given["prefix_new_tokens"], stops=False)}
            if turn == 0:
                found.append(Sample(f"{shots}, memory", {**payload, "kind": "prefix memory"}))
            for name, stored in (("dense", False), ("paged", False), ("paged", True)):
                timed_one = {**payload, "kind": "prefix speed", "contender": name, "stored": stored}
                found.append(Sample(f"{shots}, {_named(name, stored)}, turn {turn}", timed_one))
    return found


def _run_waste(given: dict, models: Models) -> dict:
    rows, paged = [], contender(models, "paged")
    fresh_pool(models, paged, given["warm"])
    steps = observed(models.backend, lambda: rows.extend(paged.generate(given["prompts"], given["lengths"])))
    counts = [len(row) for row in rows]
    share = dense_share([len(prompt) for prompt in given["prompts"]], counts)
    return {"kind": "waste", "paged": 1 - sum(steps.waste) / len(steps.waste), "dense": share}


def _run_sharing(given: dict, models: Models) -> dict:
    rows, model = given["rows"], models.backend
    mode = {"num_beams": rows} if given["mode"] == "beams" else {"do_sample": True, "num_return_sequences": rows}
    fresh_pool(models, contender(models, "paged"), given["warm"])
    inputs, options = padded(models, given["prompts"]), {**arguments(models, given["lengths"]), **mode}
    steps = observed(model, lambda: model.generate(**inputs, **options))
    kept = {key: given[key] for key in ("kind", "workload", "mode", "rows")}
    lengths = [len(prompt) for prompt in given["prompts"]]
    return {**kept, "saving": steps.saving, "prompt_tokens": sum(lengths) / len(lengths)}


def _run_prefix_memory(given: dict, models: Models) -> dict:
    paged = contender(models, "paged")
    fresh_pool(models, paged, [*given["warm"], given["prefix"]])
    steps = observed(models.backend, lambda: paged.generate(given["prompts"], given["lengths"]))
    return {"kind": given["kind"], "shots": given["shots"], "saving": steps.saving}


def _run_prefix_speed(given: dict, models: Models) -> dict:
    chosen = contender(models, given["contender"])
    stored = [given["prefix"]] if given["stored"] else []
    record = timed(models, chosen, given["prompts"], given["warm"], given["lengths"], stored)
    return {**record, **{key: given[key] for key in ("kind", "shots", "turn", "contender", "stored")}}


_RUN = {
    "waste": _run_waste,
    "sharing": _run_sharing,
    "prefix memory": _run_prefix_memory,
    "prefix speed": _run_prefix_speed,
}


def _named(name: str, stored: bool) -> str:
    return f"{name}, prefix stored before" if stored else name


def _by_prefix(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The turns of each prefix and contender."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for one in records:
        groups.setdefault((one["shots"], _named(one["contender"], one["stored"])), []).append(one)
    return groups


def _sharing_table(records: list[dict]) -> Table:
    rows = [[one["workload"], one["mode"], one["rows"], one["prompt_tokens"], 100 * one["saving"]] for one in records]
    columns = ["Prompts", "Mode", "Rows a prompt", "Prompt tokens, mean", "Blocks saved (%)"]
    return Table("Saved by sharing", columns, rows)


def _prefix_table(groups: dict[tuple[str, str], list[dict]]) -> Table:
    rows = []
    for (shots, name), some in groups.items():
        hits = prefix_hits(some[0])
        speeds = [rate(some, "requests"), rate(some), NONE if hits is None else 100 * hits]
        rows.append([shots, name, some[0]["prompt_tokens"] / some[0]["requests"], *speeds])
    columns = ["Prefix", "Contender", "Prompt tokens, mean", "Requests/s", "New tokens/s", "Prompt tokens found (%)"]
    return Table("Shared prefix", columns, rows, "Medians of the turns.")
