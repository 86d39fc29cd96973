"""Latency under arrivals: requests come one by one, as a Poisson process."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy

from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.arrivals import Clock, poisson
from hf_paged_evals.speed.contenders import Lengths, contender, label
from hf_paged_evals.speed.contenders.local import arguments, padded
from hf_paged_evals.speed.timing import fresh_pool

_COLUMNS = ["Rate (requests/s)", "Server", "Served (requests/s)"] + [
    f"{name} {kind} (ms)" for name in ("TTFT", "TPOT", "ITL") for kind in ("median", "p99")
]


class Latency:
    """The same requests at the same times: to dense, which serves one batch after another, and to paged."""

    name = "latency"
    title = "Latency under arrivals"
    settings = {"requests": 16, "new_tokens": 48, "max_prompt": 512, "rates": [0.25, 0.5, 1.0, 2.0], "batches": [1, 8]}
    quick = {"requests": 4, "new_tokens": 12, "max_prompt": 128, "rates": [2.0]}
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        prompts = workloads.ragged(options, given["requests"], given["max_prompt"])
        servers = [("dense", batch) for batch in given["batches"]] + [("paged", None)]
        return [
            Sample(
                f"{rate} a second, {label(name, batch)}",
                {
                    "rate": float(rate),
                    "server": name,
                    "batch": batch,
                    "prompts": prompts,
                    "arrivals": poisson(rate, len(prompts), options.seed),
                    "warm": workloads.warming(prompts, options),
                    "lengths": Lengths(given["new_tokens"], stops=False),
                },
            )
            for rate in given["rates"]
            for name, batch in servers
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        fresh_pool(models, contender(models, given["server"], given["batch"]), given["warm"])
        serve = _one_thread_a_request if given["server"] == "paged" else _batch_after_batch
        began = time.perf_counter()
        served = serve(models, given, began)
        requests = [
            {"arrival": arrival, "tokens": [round(moment - began, 5) for moment in times]}
            for arrival, times in zip(given["arrivals"], served)
        ]
        return {**{key: given[key] for key in ("rate", "server", "batch")}, "requests": requests}

    def summarise(self, records: list[dict], options: Options) -> Section:
        measured = [(record, measures(record["requests"])) for record in records]
        top = max(record["rate"] for record in records)
        figures = [
            Figure(f"{top:g}/s, {label(record['server'], record['batch'])}: {name}", seen[key], "ms", better="lower")
            for record, seen in measured
            if record["rate"] == top
            for name, key in (("TTFT, median", ("TTFT", 50)), ("TPOT, median", ("TPOT", 50)), ("ITL, p99", ("ITL", 99)))
        ]
        given = options.settings_of(self)
        count = len(records[0]["requests"])
        return Section(
            self.name,
            self.title,
            _summary(measured, top),
            figures,
            [_table(measured)],
            [_plot(measured, *what) for what in (("TTFT", 50), ("TTFT", 99), ("TPOT", 50), ("ITL", 99))],
            [
                f"{count} requests with {given['new_tokens']} new tokens each; every server gets the same ones at the "
                f"same times. With so few, the p99 of TTFT and TPOT is nearly that of the slowest request.",
                "TTFT: from arrival to the first token. TPOT: from the first token to the last, over the tokens "
                "after the first. ITL: between one token and the next, over all requests.",
                "Dense takes the requests that wait, up to its batch, and lets no other in until the batch is done. "
                "Paged: every request is a thread that calls generate; they share the engine's steps.",
            ],
        )


def _one_thread_a_request(models: ModelPair, given: dict, began: float) -> list[list[float]]:
    def serve(arrival: float, prompt: list[int]) -> list[float]:
        _wait_until(began + arrival)
        return _generate(models, models.backend, [prompt], given["lengths"])

    with ThreadPoolExecutor(len(given["prompts"])) as threads:
        return list(threads.map(serve, given["arrivals"], given["prompts"]))


def _batch_after_batch(models: ModelPair, given: dict, began: float) -> list[list[float]]:
    arrivals, prompts, served = given["arrivals"], given["prompts"], []
    while len(served) < len(prompts):
        first = len(served)
        _wait_until(began + arrivals[first])
        now = time.perf_counter() - began
        waiting = sum(arrival <= now for arrival in arrivals[first:])
        rows = prompts[first : first + min(waiting, given["batch"])]
        served += [_generate(models, models.baseline, rows, given["lengths"])] * len(rows)
    return served


def _generate(models: ModelPair, model, prompts: list[list[int]], lengths: Lengths) -> list[float]:
    clock = Clock()
    model.generate(**padded(models, prompts), **arguments(models, lengths), streamer=clock)
    return clock.times


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def measures(requests: list[dict]) -> dict:
    """Medians and 99th percentiles in milliseconds, by ``(name, percentile)``; and ``"served"``, requests a second."""
    first = [request["tokens"][0] - request["arrival"] for request in requests]
    times = [request["tokens"] for request in requests]
    each = [(row[-1] - row[0]) / (len(row) - 1) for row in times if len(row) > 1] or [0.0]
    gaps = [after - before for row in times for before, after in zip(row, row[1:])] or [0.0]
    found = {
        (name, percent): float(1000 * numpy.percentile(values, percent))
        for name, values in (("TTFT", first), ("TPOT", each), ("ITL", gaps))
        for percent in (50, 99)
    }
    return found | {"served": len(requests) / max(row[-1] for row in times)}


def _table(measured: list) -> Table:
    rows = [
        [record["rate"], label(record["server"], record["batch"]), seen["served"]]
        + [seen[name, percent] for name in ("TTFT", "TPOT", "ITL") for percent in (50, 99)]
        for record, seen in measured
    ]
    return Table("By rate of arrivals", _COLUMNS, rows)


def _plot(measured: list, name: str, percent: int) -> Plot:
    series: dict[str, list[list[float]]] = {}
    for record, seen in measured:
        points = series.setdefault(label(record["server"], record["batch"]), [])
        points.append([record["rate"], seen[name, percent]])
    kind = "median" if percent == 50 else "99th percentile"
    rates = sorted({record["rate"] for record, _ in measured})
    if len(rates) == 1:  # A point is no line.
        series = {server: [[0, value]] for server, [(_, value)] in series.items()}
        return Plot(f"{name}, {kind}", "bar", "arrivals (requests/s)", f"{name} (ms)", series, [f"{rates[0]:g}"])
    return Plot(f"{name}, {kind}", "line", "arrivals (requests/s)", f"{name} (ms)", series)


def _summary(measured: list, top: float) -> str:
    at_top = {
        label(record["server"], record["batch"]): seen["TTFT", 50] for record, seen in measured if record["rate"] == top
    }
    words = [f"{value / 1000:.2f} s with {name}" for name, value in at_top.items()]
    return f"At {top:g} requests a second the median wait for the first token is {', '.join(words)}."
