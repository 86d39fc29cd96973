"""The cost of a decode step around its forward: schedule, prepare, commit (with the prefix cache). No model runs.

python evals/scheduler_cost.py [--rows 64 --rows 256 --rows 1024] [--context 512] [--window 256] [--steps 32]

Medians in milliseconds over one full group and, with --window, one of a sliding window.
"""

import argparse
import time
from statistics import median

import torch

from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.execution.step_inputs import prepare_inputs
from hf_paged.memory.block_pool import BlockPool
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Scheduler

BLOCK_SIZE = 16


class Group:
    """Blocks without tensors behind them: `prepare_inputs` asks a storage for nothing."""

    def __init__(self, num_blocks: int, window: int | None):
        self.blocks, self.window = BlockPool(num_blocks, BLOCK_SIZE), window
        self.allocate_or_grow = self.blocks.allocate
        self.layers = {0 if window is None else 1: None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--window", type=int)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    windows = [None] if arguments.window is None else [None, arguments.window]
    print(f"context {arguments.context}, blocks of {BLOCK_SIZE}, windows {windows}")
    for rows in arguments.rows or [64, 256, 1024]:
        blocks = rows * (2 + (arguments.context + arguments.steps) // BLOCK_SIZE)
        seconds = costs(rows, arguments.context, arguments.steps, [Group(blocks, window) for window in windows])
        columns = " ".join(f"{name} {median(times) * 1e3:.2f}" for name, times in seconds.items())
        total = sum(map(median, seconds.values()))
        print(f"{rows:5} rows: {columns} ms, {total / rows * 1e6:.2f} us a row")


def costs(rows: int, context: int, steps: int, groups: list[Group]) -> dict[str, list[float]]:
    """Seconds of each part of each decode step. Rows differ in length, so that few need a block at a time."""
    scheduler = Scheduler(groups, token_budget=rows * context)
    for row in range(rows):
        request = Request([row] * (context - row % BLOCK_SIZE), [group.blocks for group in groups])
        request.salt = ""  # Its blocks are hashed and stored.
        scheduler.add(request)
    buffers = StepBuffers(torch.device("cpu"))
    seconds = {"schedule": [], "prepare": [], "commit": []}
    for step in range(1 + steps):
        times = [time.perf_counter()]
        schedule = scheduler.schedule()
        times.append(time.perf_counter())
        prepare_inputs(schedule.chunks, groups, buffers)
        times.append(time.perf_counter())
        scheduler.commit(schedule)
        times.append(time.perf_counter())
        assert len(schedule.chunks) == rows
        for chunk in schedule.chunks:
            chunk.request.tokens.append(1)
        for name, began, ended in zip(seconds, times, times[1:]):
            if step > 0:  # The first step is the prefill.
                seconds[name].append(ended - began)
    return seconds


if __name__ == "__main__":
    main()
