"""The table of the PagedAttention paper, reproduced: waste, and the memory and time that sharing saves."""

from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.contenders import Lengths, contender
from hf_paged_evals.speed.contenders.local import arguments, padded
from hf_paged_evals.speed.observe import observed
from hf_paged_evals.speed.paper_figures import dense_share, padding, rows_beside_paper
from hf_paged_evals.speed.timing import Spread, fresh_pool, prefix_hits, rate, ratio, timed

_COLUMNS = ["What", "The paper", "Here"]


class Paper:
    """Shares of memory from the pool at every step; the throughput of shared prefixes from timed turns."""

    name = "paper"
    title = "The paper's table, reproduced"
    settings = {
        "kinds": ["waste", "sharing", "long", "prefix"],
        "max_prompt": 1024,
        "waste_prompts": 32,
        "waste_new_tokens": 128,
        "prompts": 4,
        "rows": [2, 4, 6],
        "new_tokens": 338,
        "short_prompt": 56,
        "short_new_tokens": 58,
        "long_prompt": 512,
        "long_new_tokens": 64,
        "long_beams": 4,
        "long_samples": 8,
        "prefix_prompts": 16,
        "own_tokens": 32,
        "prefix_new_tokens": 32,
        "repeats": 3,
    }
    quick = {
        "max_prompt": 64,
        "waste_prompts": 6,
        "waste_new_tokens": 16,
        "prompts": 1,
        "rows": [4],
        "new_tokens": 16,
        "short_new_tokens": 8,
        "long_prompt": 64,
        "long_new_tokens": 8,
        "prefix_prompts": 3,
        "prefix_new_tokens": 4,
        "repeats": 1,
    }
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        unknown = [kind for kind in given["kinds"] if kind not in _SAMPLES]
        if unknown:
            raise ValueError(f"paper.kinds names some of {', '.join(_SAMPLES)}; got {', '.join(unknown)}")
        return [sample for kind in given["kinds"] for sample in _SAMPLES[kind](options, given)]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        return _RUN[sample.payload["kind"]](sample.payload, models)

    def summarise(self, records: list[dict], options: Options) -> Section:
        of = {kind: [record for record in records if record["kind"] == kind] for kind in _RUN}
        groups = _by_prefix(of["prefix speed"])
        gains = _gains(groups)
        beside = rows_beside_paper(of["waste"], of["sharing"], of["prefix memory"], gains)
        tables = [
            Table("Beside the paper's figures", _COLUMNS, beside, "Kwon et al., SOSP 2023; its blocks hold 16 tokens.")
        ]
        tables += [_sharing_table(of["sharing"])] if of["sharing"] else []
        tables += [_prefix_table(groups)] if groups else []
        figures = [*_waste_figures(of["waste"]), *_sharing_figures(of["sharing"]), *_prefix_figures(gains)]
        return Section(self.name, self.title, _summary(of["waste"]), figures, tables, [], _notes(options, self))


def _waste(options: Options, given: dict) -> list[Sample]:
    prompts = workloads.ragged(options, given["waste_prompts"], given["max_prompt"])
    payload = {"kind": "waste", "prompts": prompts, "warm": workloads.warming(prompts, options)}
    return [Sample("waste", {**payload, "lengths": Lengths(given["waste_new_tokens"])})]


def _sharing(options: Options, given: dict) -> list[Sample]:
    """Samples and beams over all prompts and over short ones."""
    all_prompts = workloads.ragged(options, given["prompts"], given["max_prompt"])
    short = workloads.ragged(options, given["prompts"], given["short_prompt"])
    modes = [(mode, rows) for rows in given["rows"] for mode in ("samples", "beams")]
    return [
        *_sharing_samples(options, "all", all_prompts, given["new_tokens"], modes),
        *_sharing_samples(options, "short", short, given["short_new_tokens"], modes),
    ]


def _long(options: Options, given: dict) -> list[Sample]:
    """Beams and samples over one long prompt."""
    prompts = [workloads.running_text(options, given["long_prompt"])]
    modes = [("beams", given["long_beams"]), ("samples", given["long_samples"])]
    return _sharing_samples(options, "long", prompts, given["long_new_tokens"], modes)


def _sharing_samples(
    options: Options, workload: str, prompts: list[list[int]], new_tokens: int, modes: list[tuple[str, int]]
) -> list[Sample]:
    payload = {
        "kind": "sharing",
        "workload": workload,
        "prompts": prompts,
        "warm": workloads.warming(prompts, options),
        "lengths": Lengths(new_tokens, stops=False),
    }
    return [Sample(f"{workload}, {rows} {mode}", {**payload, "mode": mode, "rows": rows}) for mode, rows in modes]


def _prefix(options: Options, given: dict) -> list[Sample]:
    found = []
    for turn in range(given["repeats"]):
        for shots, prefix in workloads.SHOTS.items():
            prompts = workloads.shared_prefix(options, given["prefix_prompts"], prefix, given["own_tokens"])
            payload = {
                "shots": shots,
                "turn": turn,
                "prompts": prompts,
                "prefix": prompts[0][:prefix],
                "warm": workloads.warming(prompts, options),
                "lengths": Lengths(given["prefix_new_tokens"], stops=False),
            }
            if turn == 0:
                found.append(Sample(f"{shots}, memory", {**payload, "kind": "prefix memory"}))
            for name, stored in (("dense", False), ("paged", False), ("paged", True)):
                timed_one = {**payload, "kind": "prefix speed", "contender": name, "stored": stored}
                found.append(Sample(f"{shots}, {_named(name, stored)}, turn {turn}", timed_one))
    return found


_SAMPLES = {"waste": _waste, "sharing": _sharing, "long": _long, "prefix": _prefix}


def _run_waste(given: dict, models: ModelPair) -> dict:
    rows, paged = [], contender(models, "paged")
    fresh_pool(models, paged, given["warm"])
    steps = observed(models.backend, lambda: rows.extend(paged.generate(given["prompts"], given["lengths"])))
    prompts, answers = [len(prompt) for prompt in given["prompts"]], [len(row) for row in rows]
    return {
        "kind": "waste",
        "paged": 1 - sum(steps.waste) / len(steps.waste),
        "paged_worst": 1 - max(steps.waste),
        "dense": dense_share(prompts, answers),
        "padding": padding(prompts),
    }


def _run_sharing(given: dict, models: ModelPair) -> dict:
    rows, model = given["rows"], models.backend
    mode = {"num_beams": rows} if given["mode"] == "beams" else {"do_sample": True, "num_return_sequences": rows}
    fresh_pool(models, contender(models, "paged"), given["warm"])
    inputs, options = padded(models, given["prompts"]), {**arguments(models, given["lengths"]), **mode}
    steps = observed(model, lambda: model.generate(**inputs, **options))
    lengths = [len(prompt) for prompt in given["prompts"]]
    return {
        **{key: given[key] for key in ("kind", "workload", "mode", "rows")},
        "saving": steps.saving,
        "used_at_end": steps.used[-1],
        "alone_at_end": steps.alone[-1],
        "prompt_tokens": sum(lengths) / len(lengths),
    }


def _run_prefix_memory(given: dict, models: ModelPair) -> dict:
    paged = contender(models, "paged")
    fresh_pool(models, paged, [*given["warm"], given["prefix"]])
    steps = observed(models.backend, lambda: paged.generate(given["prompts"], given["lengths"]))
    return {"kind": given["kind"], "shots": given["shots"], "saving": steps.saving}


def _run_prefix_speed(given: dict, models: ModelPair) -> dict:
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


def _gains(groups: dict[tuple[str, str], list[dict]]) -> dict[tuple[str, str], Spread]:
    """The speed of each contender but dense over that of dense, by prefix and name."""
    return {
        (shots, name): ratio(groups[shots, "dense"], some, what="requests")
        for (shots, name), some in groups.items()
        if name != "dense"
    }


def _summary(waste: list[dict]) -> str:
    if not waste:
        return "Blocks that sharing saves."
    return (
        f"{100 * waste[0]['paged']:.1f} % of the KV memory in use holds tokens, where the paper says 96 %; "
        f"dense {100 * waste[0]['dense']:.0f} %, where it says 20 to 38 %."
    )


def _waste_figures(records: list[dict]) -> list[Figure]:
    return [
        figure
        for one in records
        for figure in (
            Figure("KV memory that holds tokens, dense", 100 * one["dense"], "%", better="higher"),
            Figure("KV memory that holds tokens, paged", 100 * one["paged"], "%", better="higher"),
            Figure("KV memory without a token, paged, mean", 100 * (1 - one["paged"]), "%", better="lower"),
            Figure("KV memory without a token, paged, at most", 100 * (1 - one["paged_worst"]), "%", better="lower"),
            Figure("padding in the rectangle of the prompts", 100 * one["padding"], "%"),
        )
    ]


def _sharing_figures(records: list[dict]) -> list[Figure]:
    """The saving of the most rows per prompt; of the one long prompt also its blocks at the end."""
    some = [one for one in records if one["workload"] != "long"]
    figures = []
    for one in some:
        if one["rows"] == max(other["rows"] for other in some):
            name = f"saved, {one['mode']}, {one['rows']} rows, {one['workload']} prompts"
            figures.append(Figure(name, 100 * one["saving"], "%", better="higher"))
    for one in records:
        if one["workload"] == "long":
            name = f"long prompt, {one['rows']} {one['mode']}: blocks at the end"
            saved = 100 * (1 - one["used_at_end"] / one["alone_at_end"])
            figures.append(Figure(name, one["used_at_end"], "blocks", better="lower"))
            figures.append(Figure(f"{name}, without sharing", one["alone_at_end"], "blocks"))
            figures.append(Figure(f"{name}, saved", saved, "%", better="higher"))
    return figures


def _prefix_figures(gains: dict[tuple[str, str], Spread]) -> list[Figure]:
    return [
        Figure(f"{shots} prefix: {name}, over dense", gain.value, "x", gain.low, gain.high, "higher")
        for (shots, name), gain in gains.items()
    ]


def _sharing_table(records: list[dict]) -> Table:
    rows = [[one["workload"], one["mode"], one["rows"], one["prompt_tokens"], 100 * one["saving"]] for one in records]
    columns = ["Prompts", "Mode", "Rows a prompt", "Prompt tokens, mean", "Blocks saved (%)"]
    return Table("Saved by sharing", columns, rows)


def _prefix_table(groups: dict[tuple[str, str], list[dict]]) -> Table:
    rows = []
    for (shots, name), some in groups.items():
        hits = prefix_hits(some[0])
        speeds = [rate(some, "requests"), rate(some), None if hits is None else 100 * hits]
        rows.append([shots, name, some[0]["prompt_tokens"] / some[0]["requests"], *speeds])
    columns = ["Prefix", "Contender", "Prompt tokens, mean", "Requests/s", "New tokens/s", "Prompt tokens found (%)"]
    return Table("Shared prefix", columns, rows, "Medians of the turns.")


def _notes(options: Options, task: Paper) -> list[str]:
    given = options.settings_of(task)
    return [
        f"Blocks of {options.block_size} tokens. Saving = blocks saved by sharing / blocks without sharing, over all "
        "steps. Waste: mean over all steps.",
        "Dense memory that holds tokens: of its rectangle of rows and positions, which keeps finished rows. The "
        "paper's systems reserved room for the longest answer besides.",
        "The paper's prefixes are stored before, its factors are over Orca, on a GPU. Here they are over dense with "
        "all requests in one batch, with the prefix stored before and without.",
        "The paper's traces are ShareGPT (161 tokens in, 338 out on average) and Alpaca (19 in, 58 out). Here: "
        f"{workloads.source(options)}, and the short ones among them, with {given['new_tokens']} and "
        f"{given['short_new_tokens']} new tokens.",
    ]
