"""Host work of one layer's op on the Triton path, without a GPU: functions called, and microseconds, until the driver.

Calls of functions are counted, because they do not depend on how busy the machine is. Triton's own part is what its
runtime does to find a compiled kernel for the arguments; the launch itself needs a driver, and is left out.

    python -m hf_paged_evals.triton.host_cost
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from hf_paged_evals.triton.targets import TARGETS, Target
from hf_paged_kernels.triton.kernel_calls import KernelCall, attention_calls, write_call

STEPS = {"decode, 8 rows": [1] * 8, "decode, 128 rows": [1] * 128, "mixed, 8 rows and a chunk": [1] * 8 + [120]}
_WIDTH, _REPEATS = 128, 300


def op_calls(target: Target, rows: list[int]) -> Callable[[], list[KernelCall]]:
    """Make the calls of `write_and_attend` for a step of rows of so many queries: 32 heads, 8 KV heads of 128."""
    num_tokens = sum(rows)
    caches = [torch.empty(2, 8, 16, 128, dtype=torch.bfloat16) for _ in range(2)]
    query = torch.empty(num_tokens, 32, 128, dtype=torch.bfloat16)
    key = torch.empty(num_tokens, 8, 128, dtype=torch.bfloat16)
    tables = torch.zeros(len(rows), _WIDTH, dtype=torch.long)
    numbers = torch.zeros(num_tokens + 1, dtype=torch.long)
    step = (tables, numbers[: len(rows)], numbers[: len(rows) + 1])

    def make() -> list[KernelCall]:
        out = query.new_empty(query.shape)
        return [
            write_call(key, key, *caches, numbers[:num_tokens]),
            *attention_calls(target.device, out, query, *caches, *step, 0.1),
        ]

    return make


def count_calls(run: Callable[[], object]) -> int:
    """Functions called, those of C included."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def microseconds(run: Callable[[], object]) -> float:
    """The median of many runs; compare only what one quiet machine measured."""
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> int:
    """Print a line for each kind of step."""
    target = TARGETS["sm90"]
    for name, rows in STEPS.items():
        make = op_calls(target, rows)
        calls = make()  # From the second layer on, what depends on shapes alone is known.
        print(f"{name}: {len(calls)} launches, {count_calls(make)} functions, {microseconds(make):.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
