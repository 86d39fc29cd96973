"""Peak memory of generation, each contender in a fresh process."""

import json
import os
import subprocess
import sys
from statistics import median

from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.contenders import label

_KEPT = ("model", "dtype", "seed", "baseline", "backend", "kv_dtype", "block_size", "memory_budget", "token_budget")
# `accelerate launch` sets these for its processes: a lone child must not wait for others.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Memory:
    """Resident memory above the loaded model."""

    name = "memory"
    title = "Peak memory"
    settings = {
        "rows": 32,
        "max_prompt": 1024,
        "new_tokens": 64,
        "long_rows": 8,
        "long_prompt": 1984,
        "generate_batch": True,
        "repeats": 1,
    }
    quick = {"rows": 8, "max_prompt": 256, "new_tokens": 8, "long_rows": 0, "generate_batch": False}
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given, made = options.settings_of(self), {}
        if given["rows"]:
            made["ragged"] = workloads.ragged(options, given["rows"], given["max_prompt"])
        if given["long_rows"]:
            made["long"] = workloads.uniform(options, given["long_rows"], given["long_prompt"])
        contenders = ["dense", "generate_batch", "paged"] if given["generate_batch"] else ["dense", "paged"]
        return [
            Sample(
                f"{workload}, {name}, turn {turn}",
                {
                    "workload": workload,
                    "contender": name,
                    "turn": turn,
                    "prompts": prompts,
                    "new_tokens": given["new_tokens"],
                },
            )
            for turn in range(given["repeats"])
            for workload, prompts in made.items()
            for name in contenders
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        seen = _measure_in_a_process(
            sample.id,
            {
                "options": {"out": "", "tasks": [self.name], **{name: getattr(models.options, name) for name in _KEPT}},
                "contender": given["contender"],
                "batch": None,
                "prompts": given["prompts"],
                "new_tokens": given["new_tokens"],
            },
        )
        return {
            "workload": given["workload"],
            "contender": given["contender"],
            "turn": given["turn"],
            "rows": len(given["prompts"]),
            "longest": max(map(len, given["prompts"])),
            "prompt_tokens": sum(map(len, given["prompts"])),
            **seen,
        }

    def summarise(self, records: list[dict], options: Options) -> Section:
        figures, tables, plots, shares = [], [], [], []
        titles = {"ragged": workloads.source(options), "long": "long prompts of equal length"}
        for workload in dict.fromkeys(record["workload"] for record in records):
            some = [record for record in records if record["workload"] == workload]
            peaks = {name: median(record["peak"] for record in turns) for name, turns in _by_contender(some).items()}
            figures += [
                Figure(f"{workload}: {name}", peak, "MiB above the model", better="lower")
                for name, peak in peaks.items()
            ]
            share = 100 * peaks["paged"] / peaks["dense"]
            figures.append(Figure(f"{workload}: paged of dense", share, "%", better="lower"))
            shares.append(f"{share:.0f} % of dense's on {titles[workload]}")
            tables.append(_table(titles[workload], some))
            plots.append(_plot(titles[workload], some))
        given = options.settings_of(self)
        notes = [
            "Each in a fresh process, after a short warm-up; all rows at once. 0 is what was resident when generation "
            "began: weights, libraries and what the warm-up left.",
            f"Every row gets {given['new_tokens']} new tokens. Figures are medians of {given['repeats']} processes.",
        ]
        return Section(self.name, self.title, f"Paged peaks at {' and '.join(shares)}.", figures, tables, plots, notes)


def _measure_in_a_process(name: str, request: dict) -> dict:
    """Hand a request to `memory_probe` and return its answer.

    Raises
    ------
    RuntimeError
        If the process fails.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    command = [sys.executable, "-m", "hf_paged_evals.speed.memory_probe"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures {name} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _by_contender(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each contender, in the order of their turns."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["contender"], []).append(record)
    return groups


def _table(title: str, records: list[dict]) -> Table:
    rows = [[label(record["contender"], None), record["turn"], record["peak"], record["seconds"]] for record in records]
    first = records[0]
    held = first["prompt_tokens"] / (first["rows"] * first["longest"])
    note = (
        f"{first['rows']} rows, {first['prompt_tokens']:,} prompt tokens, the longest {first['longest']:,}: "
        f"{100 * (1 - held):.0f} % of the dense rectangle is padding."
    )
    return Table(f"Peak, {title}", ["Contender", "Turn", "Peak (MiB)", "Time (s)"], rows, note)


def _plot(title: str, records: list[dict]) -> Plot:
    series = {record["contender"]: record["course"] for record in records}
    return Plot(f"Memory over time, {title}", "line", "time (s)", "memory above the model (MiB)", series)
