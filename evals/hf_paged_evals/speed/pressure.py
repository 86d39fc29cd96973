"""A pool too small: rows queue and are preempted. Its cost, and the answers that stay the same."""

import dataclasses
import time

import hf_paged
from hf_paged.cli.plan.footprint import footprint
from hf_paged.cli.plan.plan import Plan
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Plot, Section, Table
from hf_paged_evals.runner.task import Sample
from hf_paged_evals.speed.contenders import Lengths, contender
from hf_paged_evals.speed.timing import digest, fresh_pool, pool_state
from hf_paged_evals.speed.watch import Watch, thinned

_EVERY = 0.02  # seconds
_COLUMNS = ["Pool", "Blocks", "Most in use", "Preemptions", "Time (s)", "New tokens/s", "Answers as in the full pool"]


class Pressure:
    """The same prompts in pools that hold all of their blocks, a half and a quarter."""

    name = "pressure"
    title = "Pool too small"
    settings = {"prompts": 32, "max_prompt": 512, "new_tokens": 96, "shares": [1.0, 0.5, 0.25]}
    quick = {"prompts": 6, "max_prompt": 128, "new_tokens": 24, "shares": [1.0, 0.4]}
    is_timed = True

    def samples(self, options: Options) -> list[Sample]:
        given = options.settings_of(self)
        if options.backend != "paged":
            raise ValueError(f"{self.name} shrinks the pool, and {options.backend!r} has none: leave it out of --tasks")
        prompts = workloads.ragged(options, given["prompts"], given["max_prompt"])
        lengths = Lengths(given["new_tokens"], stops=False)
        blocks = [-(-(len(prompt) + given["new_tokens"]) // options.block_size) for prompt in prompts]
        warm = workloads.warming(prompts, options)
        return [
            Sample(
                f"{100 * share:.0f} % of the blocks",
                {
                    "share": float(share),
                    "prompts": prompts,
                    "warm": warm,
                    "lengths": lengths,
                    "blocks": max(max(blocks), round(share * sum(blocks))),  # A row must fit alone.
                },
            )
            for share in given["shares"]
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given, model = sample.payload, models.backend
        chosen = contender(models, "paged")
        config = dataclasses.replace(models.options.paged_config(), memory_budget=_budget_of(models, given["blocks"]))
        hf_paged.configure(model, config)
        try:
            fresh_pool(models, chosen, given["warm"])
            with models.counting() as counts, Watch(lambda: hf_paged.stats(model), _EVERY) as watch:
                began = time.perf_counter()
                rows = chosen.generate(given["prompts"], given["lengths"])
                seconds = time.perf_counter() - began
            state = pool_state(model)
        finally:
            hf_paged.configure(model, models.options.paged_config())
        course = [[moment, 100 * seen.used_blocks / max(seen.total_blocks, 1)] for moment, seen in watch.seen]
        return {
            "share": given["share"],
            "seconds": seconds,
            "new_tokens": sum(map(len, rows)),
            "answers": [digest(row) for row in rows],
            "pool": state | vars(counts),
            "most": max(seen.used_blocks for _, seen in watch.seen),
            "course": thinned(course),
        }

    def summarise(self, records: list[dict], options: Options) -> Section:
        full, tight = records[0], records[-1]
        slower = full["seconds"] / tight["seconds"]
        equal = [sum(a == b for a, b in zip(record["answers"], full["answers"])) for record in records]
        preempted = tight["pool"]["preemptions"]
        return Section(
            self.name,
            self.title,
            f"With {100 * tight['share']:.0f} % of the blocks that all rows need at their ends, {preempted} rows were "
            f"preempted, throughput is {slower:.2f} times that of the full pool, and {equal[-1]} of "
            f"{len(full['answers'])} answers are the same.",
            [
                Figure("throughput of the smallest pool, of the full one's", 100 * slower, "%", better="higher"),
                Figure("preemptions in the smallest pool", preempted, "rows", better="lower"),
                Figure("answers as in the full pool", 100 * min(equal) / len(full["answers"]), "%", better="higher"),
            ],
            [_table(records, equal)],
            [_plot(records)],
            [
                "The pool's size is a share of the blocks that all rows hold at their ends. Rows that do not fit wait; "
                "when blocks run out, the row that came last gives its blocks back and runs its tokens again later.",
                *_differences(options, equal, len(full["answers"])),
            ],
        )


def _budget_of(models: ModelPair, blocks: int) -> int:
    """The memory_budget of so many blocks in each attention group, beside the steps."""
    model, size, tokens = models.backend, models.options.block_size, models.options.token_budget
    return Plan(footprint(model.config, model.dtype), blocks, size, size, model.dtype, tokens).budget_needed


def _table(records: list[dict], equal: list[int]) -> Table:
    rows = [
        [
            f"{100 * record['share']:.0f} %",
            record["pool"]["total_blocks"],
            record["most"],
            record["pool"]["preemptions"],
        ]
        + [record["seconds"], record["new_tokens"] / record["seconds"], f"{same} of {len(record['answers'])}"]
        for record, same in zip(records, equal)
    ]
    return Table("By size of the pool", _COLUMNS, rows)


def _plot(records: list[dict]) -> Plot:
    series = {f"{100 * record['share']:.0f} % of the blocks": record["course"] for record in records}
    return Plot("Pool utilisation over time", "line", "time (s)", "blocks in use (%)", series)


def _differences(options: Options, equal: list[int], count: int) -> list[str]:
    if min(equal) == count or options.dtype == "float32":
        return []
    return [f"In {options.dtype} a row that runs in other company rounds otherwise: answers part at near-ties."]
