"""Offline throughput: all prompts are there at once, how long until every answer is?"""

from hf_paged_evals.suite.models import Models
from hf_paged_evals.suite.options import Options
from hf_paged_evals.suite.task import Figure, Plot, Sample, Section, Table

from . import workloads
from .contenders import EXTRAS, Lengths, contender, label
from .timing import median, obstacles, prefix_hits, rate, ratio, timed

_COLUMNS = ["Contender", "Requests/s", "Prompt tokens/s", "New tokens/s", "Paged over this (x)", "Answers as the first"]


class Throughput:
    """Contenders in turns over the same prompts; a turn runs each of them once."""

    name = "throughput"
    title = "Offline throughput"
    settings = {
        "prompts": 32,
        "new_tokens": 64,
        "max_prompt": 1024,
        "uniform_prompt": 256,
        "batches": [1, 8, 32],
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
        given = options.settings_of(self)
        made = {
            "ragged": (workloads.ragged(options, given["prompts"], given["max_prompt"]), True),
            "uniform": (workloads.uniform(options, given["prompts"], given["uniform_prompt"]), False),
        }
        found = []
        for turn in range(given["repeats"]):
            for workload, (prompts, stops) in made.items():
                for name, batch in _contenders(workload, given, len(prompts)):
                    payload = {
                        **{"workload": workload, "contender": name, "batch": batch, "turn": turn},
                        **{"prompts": prompts, "warm": workloads.warming(prompts, options)},
                        "lengths": Lengths(given["new_tokens"], stops),
                    }
                    found.append(Sample(f"{workload}, {label(name, batch)}, turn {turn}", payload))
        return found

    def run(self, sample: Sample, models: Models) -> dict:
        given = sample.payload
        chosen = contender(models, given["contender"], given["batch"])
        record = timed(models, chosen, given["prompts"], given["warm"], given["lengths"])
        return {**record, **{key: given[key] for key in ("workload", "contender", "batch", "turn")}}

    def summarise(self, records: list[dict], options: Options) -> Section:
        ran = [record for record in records if "seconds" in record]
        figures, tables, plots, says = [], [], [], []
        titles = {"ragged": workloads.source(options), "uniform": "prompts and answers of equal length"}
        for workload, title in titles.items():
            some = [record for record in ran if record["workload"] == workload]
            groups = _by_contender(some)
            best = max((key for key in groups if key[0] == "dense"), key=lambda key: rate(groups[key]))
            paged = max((key for key in groups if key[0] == "paged"), key=lambda key: key[1])
            gain = ratio(groups[best], groups[paged])
            figures += [
                Figure(f"{workload}: paged", rate(groups[paged]), "new tokens/s", better="higher"),
                Figure(f"{workload}: dense at its best, batch {best[1]}", rate(groups[best]), "new tokens/s"),
                Figure(f"{workload}: paged over dense at its best", gain.value, "x", gain.low, gain.high, "higher"),
            ]
            tables.append(_table(title, groups, paged))
            if len({batch for name, batch in groups if name == "dense"}) > 1:
                plots.append(_plot(title, groups))
            says.append(f"{gain.value:.2f} times the new tokens per second of dense at its best on {title}")
        return Section(
            self.name,
            self.title,
            f"Paged generates {', and '.join(says)}.",
            figures,
            tables,
            plots,
            [*_notes(options.settings_of(self)), *obstacles(records), *_prefixes(ran)],
        )


def _contenders(workload: str, given: dict, count: int) -> list[tuple[str, int | None]]:
    """Ragged prompts at every batch size, the others at the largest: time is short."""
    batches = sorted({min(batch, count) for batch in given["batches"]})
    batches = batches if workload == "ragged" else batches[-1:]
    extras = [(name, None) for name in EXTRAS] if given["extras"] and workload == "ragged" else []
    inside = [(name, batch) for batch in batches for name in ("dense", "paged")]
    return [*inside, ("generate_batch", None), *extras]


def _by_contender(records: list[dict]) -> dict[tuple[str, int | None], list[dict]]:
    """The records of each contender, in the order of their turns."""
    groups: dict[tuple[str, int | None], list[dict]] = {}
    for record in records:
        groups.setdefault((record["contender"], record["batch"]), []).append(record)
    return groups


def _table(title: str, groups: dict, paged: tuple) -> Table:
    first, rows = next(iter(groups.values()))[0]["answers"], []
    for key, records in groups.items():
        equal = sum(ours == theirs for ours, theirs in zip(records[0]["answers"], first))
        speeds = [rate(records, what) for what in ("requests", "prompt_tokens", "new_tokens")]
        rows.append([label(*key), *speeds, ratio(records, groups[paged]).value, f"{equal} of {len(first)}"])
    turns = max(map(len, groups.values()))
    note = f"Medians of {turns} turn{'s' if turns > 1 else ''}; prompt and new tokens over the time of the whole run."
    return Table(title[0].upper() + title[1:], _COLUMNS, rows, note)


def _plot(title: str, groups: dict) -> Plot:
    series = {}
    for name in ("dense", "paged"):
        series[name] = sorted([batch, rate(groups[key])] for key in groups if key[0] == name for batch in key[1:])
    widest = max(batch for batch, _ in series["dense"])
    for (name, batch), records in groups.items():
        if batch is None:
            series[name] = [[widest, rate(records)]]
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
