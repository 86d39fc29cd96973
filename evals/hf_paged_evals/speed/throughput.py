"""Offline throughput: all prompts are there at once, and the time counts until every answer is."""

from statistics import median

from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.contenders import EXTRAS, Lengths, contender, label
from hf_paged_evals.speed.timing import obstacles, prefix_hits, rate, ratio, timed

_COLUMNS = ["Contender", "Requests/s", "Prompt tokens/s", "New tokens/s", "Paged over this (x)", "Answers as the first"]

Key = tuple[str, int | None]  # Name and batch of a contender.


class Throughput:
    """Contenders in turns over the same prompts; a turn runs each of them once."""

    name = "throughput"
    title = "Offline throughput"
    settings = {
        "workloads": ["ragged", "uniform"],
        "prompts": 32,
        "new_tokens": 64,
        "max_prompt": 1024,
        "uniform_prompt": 256,
        "batches": [1, 8, 32],
        "prepacked": True,
        "repeats": 3,
        "extras": True,
    }
    quick = {
        "prompts": 6,
        "new_tokens": 8,
        "max_prompt": 64,
        "uniform_prompt": 32,
        "batches": [1, 8],
        "repeats": 1,
        "extras": False,
    }
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given, found = options.settings_of(self), []
        made = {name: _WORKLOADS[name](options, given) for name in _known(given["workloads"])}
        for turn in range(given["repeats"]):
            for workload, (prompts, stops) in made.items():
                warm, lengths = workloads.warming(prompts, options), Lengths(given["new_tokens"], stops)
                for name, batch in _contenders(workload, given, len(prompts)):
                    payload = {
                        "workload": workload,
                        "contender": name,
                        "batch": batch,
                        "turn": turn,
                        "prompts": prompts,
                        "warm": warm,
                        "lengths": lengths,
                    }
                    found.append(Sample(f"{workload}, {label(name, batch)}, turn {turn}", payload))
        return found

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        chosen = contender(models, given["contender"], given["batch"])
        record = timed(models, chosen, given["prompts"], given["warm"], given["lengths"])
        return {**record, **{key: given[key] for key in ("workload", "contender", "batch", "turn")}}

    def summarise(self, records: list[dict], options: Options) -> Section:
        ran = [record for record in records if "seconds" in record]
        figures, tables, plots, gains = [], [], [], []
        titles = {"ragged": workloads.source(options), "uniform": "prompts and answers of equal length"}
        for workload in dict.fromkeys(record["workload"] for record in ran):
            groups = _by_contender([record for record in ran if record["workload"] == workload])
            best, paged = _best_dense(groups), _largest_paged(groups)
            gain = ratio(groups[best], groups[paged])
            figures.append(
                Figure(f"{workload}: paged over dense at its best", gain.value, "x", gain.low, gain.high, "higher")
            )
            figures += [
                Figure(f"{workload}: {label(*key)}", rate(some), "new tokens/s", better="higher")
                for key, some in groups.items()
            ]
            equal, count = _equal_answers(groups[best], groups[paged])
            figures.append(Figure(f"{workload}: answers of paged as of dense", equal, f"of {count}", better="higher"))
            tables.append(_table(titles[workload], groups, paged))
            if len({batch for name, batch in groups if name == "dense"}) > 1:
                plots.append(_plot(titles[workload], groups))
            gains.append(f"{gain.value:.2f} times the new tokens per second of dense at its best on {titles[workload]}")
        notes = [*_notes(options.settings_of(self)), *obstacles(records), *_prefixes(ran)]
        return Section(self.name, self.title, f"Paged generates {', and '.join(gains)}.", figures, tables, plots, notes)


def _ragged(options: Options, given: dict) -> tuple[list[list[int]], bool]:
    """Prompts, and whether an answer may end early."""
    return workloads.ragged(options, given["prompts"], given["max_prompt"]), True


def _uniform(options: Options, given: dict) -> tuple[list[list[int]], bool]:
    return workloads.uniform(options, given["prompts"], given["uniform_prompt"]), False


_WORKLOADS = {"ragged": _ragged, "uniform": _uniform}


def _known(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in _WORKLOADS]
    if unknown or not names:
        raise ValueError(f"throughput.workloads names some of {', '.join(_WORKLOADS)}; got {names}")
    return names


def _contenders(workload: str, given: dict, count: int) -> list[Key]:
    """Ragged prompts at every batch size, the others at the largest: time is short."""
    batches = sorted({min(batch, count) for batch in given["batches"]})
    batches = batches if workload == "ragged" else batches[-1:]
    inside = [(name, batch) for batch in batches for name in ("dense", "paged")]
    if given["prepacked"]:
        inside.append(("paged, prepacked", batches[-1]))
    extras = [(name, None) for name in EXTRAS] if given["extras"] and workload == "ragged" else []
    return [*inside, ("generate_batch", None), *extras]


def _by_contender(records: list[dict]) -> dict[Key, list[dict]]:
    """The records of each contender, in the order of their turns."""
    groups: dict[Key, list[dict]] = {}
    for record in records:
        groups.setdefault((record["contender"], record["batch"]), []).append(record)
    return groups


def _best_dense(groups: dict[Key, list[dict]]) -> Key:
    return max((key for key in groups if key[0] == "dense"), key=lambda key: rate(groups[key]))


def _largest_paged(groups: dict[Key, list[dict]]) -> Key:
    return max((key for key in groups if key[0] == "paged"), key=lambda key: key[1])


def _equal_answers(records: list[dict], others: list[dict]) -> tuple[int, int]:
    """Answers of the first turn that two contenders have in common, and all of them."""
    first, second = records[0]["answers"], others[0]["answers"]
    return sum(ours == theirs for ours, theirs in zip(first, second)), len(first)


def _table(title: str, groups: dict[Key, list[dict]], paged: Key) -> Table:
    first, rows = next(iter(groups.values())), []
    for key, records in groups.items():
        equal, count = _equal_answers(first, records)
        speeds = [rate(records, what) for what in ("requests", "prompt_tokens", "new_tokens")]
        rows.append([label(*key), *speeds, ratio(records, groups[paged]).value, f"{equal} of {count}"])
    turns = max(map(len, groups.values()))
    note = f"Medians of {turns} turn{'s' if turns > 1 else ''}; prompt and new tokens over the time of the whole run."
    return Table(title[0].upper() + title[1:], _COLUMNS, rows, note)


def _plot(title: str, groups: dict[Key, list[dict]]) -> Plot:
    series = {}
    for name in ("dense", "paged"):
        series[name] = sorted([batch, rate(groups[key])] for key in groups if key[0] == name for batch in key[1:])
    widest = max(batch for batch, _ in series["dense"])
    for (name, batch), records in groups.items():
        if name not in series:
            series[name] = [[batch or widest, rate(records)]]
    return Plot(f"Throughput, {title}", "line", "batch (rows)", "throughput (new tokens/s)", series)


def _notes(given: dict) -> list[str]:
    return [
        f"Greedy, at most {given['new_tokens']} new tokens a prompt. Before each timed run the contender generates "
        "from other prompts and the pool is released: no earlier run's prefix is hit.",
        "Ratios are medians of the turns' own ratios: within a turn all contenders see the same noise.",
    ]


def _prefixes(records: list[dict]) -> list[str]:
    shares = [share for share in map(prefix_hits, records) if share is not None]
    return [f"Prompt tokens that paged runs found in the pool already: {100 * median(shares):.1f} %."] if shares else []
