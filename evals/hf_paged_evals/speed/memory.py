"""Peak memory of generation, each contender in a fresh process."""

import json
import os
import subprocess
import sys

from hf_paged_evals.suite.models import Models
from hf_paged_evals.suite.options import Options
from hf_paged_evals.suite.task import Figure, Plot, Sample, Section, Table

from . import workloads
from .contenders import label

_KEPT = ("model", "dtype", "seed", "baseline", "backend", "kv_dtype", "block_size", "memory_budget", "token_budget")
# What `accelerate launch` tells its processes: a lone child must not wait for their like.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Memory:
    """Resident memory above the loaded model."""

    name = "memory"
    title = "Peak memory"
    settings = {
        **{"rows": 32, "max_prompt": 1024, "new_tokens": 64},
        **{"long_rows": 8, "long_prompt": 1984, "generate_batch": True},
    }
    quick = {"rows": 8, "max_prompt": 256, "new_tokens": 8, "long_rows": 0, "generate_batch": False}
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        made = {"ragged": workloads.ragged(options, given["rows"], given["max_prompt"])}
        if given["long_rows"]:
            made["long"] = workloads.uniform(options, given["long_rows"], given["long_prompt"])
        contenders = ["dense", *(["generate_batch"] if given["generate_batch"] else []), "paged"]
        return [
            Sample(
                f"{workload}, {name}",
                {"workload": workload, "contender": name, "prompts": prompts, "new_tokens": given["new_tokens"]},
            )
            for workload, prompts in made.items()
            for name in contenders
        ]

    def run(self, sample: Sample, models: Models) -> dict:
        given = sample.payload
        fields = {name: getattr(models.options, name) for name in _KEPT}
        request = {
            "options": {"out": "", "tasks": [self.name], **fields},
            **{"contender": given["contender"], "batch": None},
            **{"prompts": given["prompts"], "new_tokens": given["new_tokens"]},
        }
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHER and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
        }
        done = subprocess.run(
            [sys.executable, "-m", "hf_paged_evals.speed.memory_probe"],
            **{"input": json.dumps(request), "capture_output": True, "text": True, "env": environment},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the process that measures {sample.id} ended with {done.returncode}: {last}")
        tokens = sum(map(len, given["prompts"]))
        size = {"rows": len(given["prompts"]), "longest": max(map(len, given["prompts"])), "prompt_tokens": tokens}
        seen = json.loads(done.stdout.splitlines()[-1])
        return {"workload": given["workload"], "contender": given["contender"], **size, **seen}

    def summarise(self, records: list[dict], options: Options) -> Section:
        figures, tables, plots, says = [], [], [], []
        titles = {"ragged": workloads.source(options), "long": "long prompts of equal length"}
        for workload in dict.fromkeys(record["workload"] for record in records):
            some = [record for record in records if record["workload"] == workload]
            peaks = {record["contender"]: record["peak"] for record in some}
            figures += [
                Figure(f"{workload}: {name}", peak, "MiB above the model", better="lower")
                for name, peak in peaks.items()
            ]
            share = 100 * peaks["paged"] / peaks["dense"]
            figures.append(Figure(f"{workload}: paged of dense", share, "%", better="lower"))
            says.append(f"{share:.0f} % of dense's on {titles[workload]}")
            tables.append(_table(titles[workload], some))
            plots.append(_plot(titles[workload], some))
        return Section(
            self.name,
            self.title,
            f"Paged peaks at {' and '.join(says)}.",
            figures,
            tables,
            plots,
            [
                "Each in a fresh process, after a short warm-up; all rows at once. 0 is what was resident when "
                "generation began: weights, libraries and what the warm-up left.",
                f"Every row gets {options.settings_of(self)['new_tokens']} new tokens.",
            ],
        )


def _table(title: str, records: list[dict]) -> Table:
    rows = [[label(record["contender"], None), record["peak"], record["seconds"]] for record in records]
    first = records[0]
    held = first["prompt_tokens"] / (first["rows"] * first["longest"])
    note = (
        f"{first['rows']} rows, {first['prompt_tokens']:,} prompt tokens, the longest {first['longest']:,}: "
        f"{100 * (1 - held):.0f} % of the dense rectangle is padding."
    )
    return Table(f"Peak, {title}", ["Contender", "Peak (MiB)", "Time (s)"], rows, note)


def _plot(title: str, records: list[dict]) -> Plot:
    series = {record["contender"]: record["course"] for record in records}
    return Plot(f"Memory over time, {title}", "line", "time (s)", "memory above the model (MiB)", series)
