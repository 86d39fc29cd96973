"""The work of a decode step beside its forward: schedule, prepare, commit, with the prefix cache and without a model.

One full group and, with ``--window``, one of a sliding window. Of preparing a step, its block tables are timed by
themselves as well: as they are kept from step to step, and made anew from the rows' lists.
"""

import argparse
import sys
import time
from statistics import median

import numpy as np
import torch

from hf_paged.execution.host_tables import HostTables
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.execution.step_inputs import prepare_inputs
from hf_paged.memory.block_pool import BlockPool
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Scheduler
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "scheduler_cost"
QUICK = {"rows": [4, 8], "context": 64, "steps": 4}
_BLOCK_SIZE = 16


class Group:
    """Blocks without tensors behind them: `prepare_inputs` asks a storage for nothing."""

    def __init__(self, num_blocks: int, window: int | None):
        self.blocks, self.window = BlockPool(num_blocks, _BLOCK_SIZE), window
        self.allocate_or_grow = self.blocks.allocate
        self.layers = {0 if window is None else 1: None}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024], help="(default: 64 256 1024)")
    parser.add_argument("--context", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--window", type=int, help="of a second group (default: none)")
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of the parts of a step, by number of rows."""
    windows = [None] if given.window is None else [None, given.window]
    figures = []
    for rows in given.rows:
        blocks = rows * (2 + (given.context + given.steps) // _BLOCK_SIZE)
        seconds = costs(rows, given.context, given.steps, [Group(blocks, window) for window in windows])
        parts = {name: median(times) for name, times in seconds.items()}
        kept, anew = parts.pop("tables kept"), parts.pop("tables anew")
        parts["all"] = sum(parts.values())
        for name, value in parts.items():
            figures.append(Figure(f"{rows} rows: {name}", 1000 * value, "ms", better="lower"))
        figures.append(Figure(f"{rows} rows: all, per row", 1e6 * parts["all"] / rows, "us", better="lower"))
        figures.append(Figure(f"{rows} rows: tables anew over kept, time", anew / kept, "x", better="higher"))
    return Section(
        NAME,
        "Scheduling a decode step",
        f"Medians of {given.steps} decode steps, {given.context} tokens per row, blocks of {_BLOCK_SIZE}.",
        figures,
    )


def costs(rows: int, context: int, steps: int, groups: list[Group]) -> dict[str, list[float]]:
    """Seconds of each part of each decode step. Rows differ in length, so that few need a block at a time."""
    scheduler = Scheduler(groups, token_budget=rows * context)
    for row in range(rows):
        request = Request([row] * (context - row % _BLOCK_SIZE), [group.blocks for group in groups])
        request.salt = ""  # Its blocks are hashed and stored.
        scheduler.add(request)
    buffers = StepBuffers(torch.device("cpu"))
    matrices = [np.zeros((rows, 2 + (context + steps) // _BLOCK_SIZE), dtype=np.int64) for _ in groups]
    kept = HostTables(matrices)
    seconds: dict[str, list[float]] = {}

    def timed(name, function, *arguments):
        began = time.perf_counter()
        result = function(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for _ in range(1 + steps):
        schedule = timed("schedule", scheduler.schedule)
        timed("prepare", prepare_inputs, schedule.chunks, groups, buffers)
        timed("commit", scheduler.commit, schedule)
        tables = [[chunk.request.tables[number] for chunk in schedule.chunks] for number in range(len(groups))]
        timed("tables kept", kept.show, tables)
        timed("tables anew", HostTables(matrices).show, tables)
        assert len(schedule.chunks) == rows
        for chunk in schedule.chunks:
            chunk.request.tokens.append(1)
    return {name: times[1:] for name, times in seconds.items()}  # The first step is the prefill.


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
