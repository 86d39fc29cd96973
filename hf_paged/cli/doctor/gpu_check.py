"""A first proof of the GPU kernels on the GPU at hand: their numbers against the reference, and their speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_paged.errors import PagedError
from hf_paged_kernels import ops, reference

_BATCHES = (
    [(1, 1), (16, 1), (17, 1), (700, 1)],
    [(40, 9), (0, 0), (33, 33), (31, 1), (150, 100)],
)  # (context, queries) of each row: a decode step, and a mixed one.
_HEADS, _DIMS, _BLOCK_SIZE = (8, 2), (64, 80, 128, 256), 16
_OPTIONS = ({}, {"window": 20, "softcap": 5.0, "sinks": True})
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # Of the largest output.
_ROWS, _CONTEXT, _KV_HEADS, _DIM = 32, 4096, 8, 128  # What is timed: 512 MiB of keys and values.
_SECONDS = 2.0  # Of each timing.


@dataclass(frozen=True)
class GpuCheck:
    """What `check_gpu` found.

    Attributes
    ----------
    cases : int
        Calls that agreed with the reference.
    attention, copy : float
        Bytes a second at which decode attention read keys and values, and at which a copy read and wrote memory.
    """

    cases: int
    attention: float
    copy: float


def check_gpu(device: torch.device) -> GpuCheck:
    """Run the ops on `device` and compare with the reference in float64; then time decode attention and a copy.

    Takes about a minute on a GPU, most of it to compile, and 1 GiB of its memory. Draws from no global random state.

    Raises
    ------
    PagedError
        If a result is wrong; says which.
    """
    cases = 0
    for dtype in _TOLERANCE:
        for dim in _DIMS:
            for batch in _BATCHES:
                for options in _OPTIONS:
                    _compare(batch, dim, dtype, dict(options), device)
                    cases += 1
    attention, copy = _bandwidths(device, _ROWS, _CONTEXT, _SECONDS)
    return GpuCheck(cases, attention, copy)


def _compare(batch, dim: int, dtype: torch.dtype, options: dict, device: torch.device) -> None:
    """One call that writes the last tokens of each row and attends; every other slot holds NaN."""
    generator = torch.Generator().manual_seed(dim)
    num_heads, num_kv_heads = _HEADS
    widths = [-(-context // _BLOCK_SIZE) for context, _ in batch]
    order = torch.randperm(sum(widths) + 1, generator=generator)
    tables = torch.full((len(batch), max(widths)), int(order[-1]))
    caches = [torch.full((len(order), num_kv_heads, _BLOCK_SIZE, dim), float("nan"), dtype=dtype) for _ in "kv"]
    slots, used = [], 0
    for row, (context, queries) in enumerate(batch):
        tables[row, : widths[row]] = order[used : used + widths[row]]
        used += widths[row]
        at = torch.arange(context)
        row_slots = tables[row, at // _BLOCK_SIZE] * _BLOCK_SIZE + at % _BLOCK_SIZE
        for cache in caches:
            states = torch.randn(context, num_kv_heads, dim, generator=generator).to(dtype)
            cache[row_slots // _BLOCK_SIZE, :, row_slots % _BLOCK_SIZE] = states
        slots.append(row_slots[context - queries :])
    slots, contexts = torch.cat(slots), torch.tensor([context for context, _ in batch])
    starts = torch.tensor([0] + [queries for _, queries in batch]).cumsum(0)
    query, *new = (
        torch.randn(len(slots), n, dim, generator=generator).to(dtype) for n in (num_heads, *[num_kv_heads] * 2)
    )
    if "sinks" in options:
        options["sinks"] = torch.randn(num_heads, generator=generator).to(dtype)
    rows = (tables, contexts, starts, dim**-0.5)
    got = ops.write_and_attend(
        *(x.to(device) for x in (query, *new, *caches, slots, *rows[:3])), rows[3],
        options.get("window"), options.get("softcap"), _moved(options.get("sinks"), device),
    )  # fmt: skip
    exact = [x.double() for x in (query, *new, *caches)]
    expected = reference.write_and_attend(
        *exact, slots, *rows, *(options.get(n) for n in ("window", "softcap", "sinks"))
    )
    error = (got.cpu().double() - expected).abs().max()
    if not error <= _TOLERANCE[dtype] * expected.abs().max():
        options = ", ".join(options) or "no options"
        raise PagedError(
            f"the attention kernels are wrong on {device} in {dtype}, head size {dim}, {options}: "
            f"an output differs by {error:.2g} from the reference"
        )


def _moved(states: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if states is None else states.to(device)


def _bandwidths(device: torch.device, num_rows: int, context: int, seconds: float) -> tuple[float, float]:
    """Bytes a second of decode attention, and of a copy of the same keys."""
    blocks = num_rows * context // _BLOCK_SIZE
    caches = [torch.zeros(blocks, _KV_HEADS, _BLOCK_SIZE, _DIM, dtype=torch.bfloat16, device=device) for _ in "kv"]
    query = torch.zeros(num_rows, 4 * _KV_HEADS, _DIM, dtype=torch.bfloat16, device=device)
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(num_rows, -1).to(device)
    contexts = torch.full((num_rows,), context, device=device)
    starts = torch.arange(num_rows + 1, device=device)
    attend = _seconds(lambda: ops.paged_attention(query, *caches, tables, contexts, starts, 0.1), device, seconds)
    copy = _seconds(lambda: caches[0].copy_(caches[1]), device, seconds)
    return 2 * caches[0].nbytes / attend, 2 * caches[0].nbytes / copy


def _seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds a run takes, on average over `seconds`, after a first one that compiles."""
    run()
    _wait(device)
    begin, taken, count = time.perf_counter(), 0.0, 0
    while taken < seconds:
        for _ in range(10):
            run()
        _wait(device)
        taken, count = time.perf_counter() - begin, count + 10
    return taken / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
