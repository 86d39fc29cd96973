"""A first proof of the GPU kernels on the GPU at hand: their numbers against the reference, and their speed."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_paged.errors import PagedError
from hf_paged_kernels import ops, reference

_BATCHES = (
    ((1, 1), (16, 1), (17, 1), (700, 1)),
    ((40, 9), (0, 0), (33, 33), (31, 1), (150, 100)),
)  # (context, queries) of each row: a decode step, and a mixed one.
_NUM_HEADS, _NUM_KV_HEADS, _DIMS, _BLOCK_SIZE = 8, 2, (64, 80, 128, 256), 16
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # Of the largest output.
# Of the timed calls, whose keys and values take 512 MiB.
_ROWS, _CONTEXT, _KV_HEADS, _DIM = 32, 4096, 8, 128
_SECONDS = 2.0  # Of each timing.


@dataclass(frozen=True)
class GpuCheck:
    """The results of `check_gpu`.

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


@dataclass(frozen=True)
class _Options:
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __str__(self):
        given = {"window": self.window, "softcap": self.softcap, "sinks": self.has_sinks}
        return ", ".join(name for name, value in given.items() if value) or "no options"


_OPTIONS = (_Options(), _Options(window=20, softcap=5.0, has_sinks=True))


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of ``ops.write_and_attend``; `_make_call` makes them."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    value: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    key_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    value_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    slot_mapping: torch.Tensor  # [num_tokens] int64
    block_tables: torch.Tensor  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor  # [num_rows] int64
    cu_seqlens_q: torch.Tensor  # [num_rows + 1] int64
    sinks: torch.Tensor | None  # [num_heads]
    options: _Options

    def run(self, write_and_attend: Callable, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Call the op with converted copies of the tensors: ``[num_tokens, num_heads, head_dim]``."""
        states = (self.query, self.key, self.value, self.key_cache, self.value_cache)
        where = (self.slot_mapping, self.block_tables, self.context_lens, self.cu_seqlens_q)
        return write_and_attend(
            *map(convert, (*states, *where)),
            self.query.shape[-1] ** -0.5,
            self.options.window,
            self.options.softcap,
            None if self.sinks is None else convert(self.sinks),
        )


def check_gpu(device: torch.device) -> GpuCheck:
    """Run the ops on `device` and compare with the reference in float64; then time decode attention and a copy.

    Takes about a minute on a GPU, most of it to compile, and 1 GiB of its memory. Draws from no global random state.

    Raises
    ------
    PagedError
        If a result is wrong; says which.
    """
    cases = list(itertools.product(_TOLERANCE, _DIMS, _BATCHES, _OPTIONS))
    for dtype, dim, batch, options in cases:
        _compare(_make_call(batch, dim, dtype, options), device)
    attention, copy = _bandwidths(device, _ROWS, _CONTEXT, _SECONDS)
    return GpuCheck(len(cases), attention, copy)


def _make_call(batch, dim: int, dtype: torch.dtype, options: _Options) -> _Call:
    """Make a call that writes the last tokens of each row and attends; every slot without a token holds NaN."""
    generator = torch.Generator().manual_seed(dim)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    widths = [-(-context // _BLOCK_SIZE) for context, _ in batch]
    order = torch.randperm(sum(widths) + 1, generator=generator)
    tables = torch.full((len(batch), max(widths)), int(order[-1]))
    caches = [torch.full((len(order), _NUM_KV_HEADS, _BLOCK_SIZE, dim), float("nan"), dtype=dtype) for _ in "kv"]
    new_slots, used = [], 0
    for row, (context, queries) in enumerate(batch):
        tables[row, : widths[row]] = order[used : used + widths[row]]
        used += widths[row]
        at = torch.arange(context)
        slots = tables[row, at // _BLOCK_SIZE] * _BLOCK_SIZE + at % _BLOCK_SIZE
        for cache in caches:
            cache[slots // _BLOCK_SIZE, :, slots % _BLOCK_SIZE] = states(context, _NUM_KV_HEADS, dim)
        new_slots.append(slots[context - queries :])
    slot_mapping = torch.cat(new_slots)
    return _Call(
        query=states(len(slot_mapping), _NUM_HEADS, dim),
        key=states(len(slot_mapping), _NUM_KV_HEADS, dim),
        value=states(len(slot_mapping), _NUM_KV_HEADS, dim),
        key_cache=caches[0],
        value_cache=caches[1],
        slot_mapping=slot_mapping,
        block_tables=tables,
        context_lens=torch.tensor([context for context, _ in batch]),
        cu_seqlens_q=torch.tensor([0] + [queries for _, queries in batch]).cumsum(0),
        sinks=states(_NUM_HEADS) if options.has_sinks else None,
        options=options,
    )


def _compare(call: _Call, device: torch.device) -> None:
    """Run a call on the device and by the reference."""
    got = call.run(ops.write_and_attend, lambda tensor: tensor.to(device, copy=True)).cpu().double()
    expected = call.run(
        reference.write_and_attend, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    error, dtype = (got - expected).abs().max(), call.query.dtype
    if not error <= _TOLERANCE[dtype] * expected.abs().max():
        raise PagedError(
            f"the attention kernels are wrong on {device} in {dtype}, head size {call.query.shape[-1]}, "
            f"{call.options}: an output differs by {error:.2g} from the reference"
        )


def _bandwidths(device: torch.device, num_rows: int, context: int, seconds: float) -> tuple[float, float]:
    """Return the bytes a second of decode attention, and of a copy of the same keys."""
    blocks, dtype = num_rows * context // _BLOCK_SIZE, torch.bfloat16
    shape = (blocks, _KV_HEADS, _BLOCK_SIZE, _DIM)
    key_cache, value_cache = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
    query = torch.zeros(num_rows, 4 * _KV_HEADS, _DIM, dtype=dtype, device=device)
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(num_rows, -1).to(device)
    contexts = torch.full((num_rows,), context, device=device)
    starts = torch.arange(num_rows + 1, device=device)

    def attend() -> None:
        ops.paged_attention(query, key_cache, value_cache, tables, contexts, starts, 0.1)

    def copy() -> None:
        key_cache.copy_(value_cache)

    num_bytes = 2 * key_cache.nbytes  # Keys and values; or read and written.
    return num_bytes / _time(attend, device, seconds), num_bytes / _time(copy, device, seconds)


def _time(run: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Return the seconds that a run takes, on average over `seconds`, after a first one that compiles."""
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
