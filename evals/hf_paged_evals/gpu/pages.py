"""Arguments of the ops: pages of any shape whose unused slots hold NaN. Imports no Triton, for it runs sanitized."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_paged_kernels.quantized import quantize, rotate

Rows = Sequence[tuple[int, int]]  # (context, queries) of each row.


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and head size of a layer."""

    num_heads: int
    num_kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.dim}"


@dataclass(frozen=True)
class OpOptions:
    """The options of an attention op."""

    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        given = {"window": self.window, "softcap": self.softcap, "sinks": self.has_sinks}
        return ", ".join(name for name, value in given.items() if value) or "none"


@dataclass(frozen=True)
class OpCase:
    """A call of an op: what it is compiled for, and what it computes on. `codes` are those of quantised pages."""

    rows: Rows
    heads: Heads
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    options: OpOptions = field(default_factory=OpOptions)
    codes: torch.dtype | None = None

    @property
    def num_tokens(self) -> int:
        return sum(queries for _, queries in self.rows)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all contexts, each once, with the scales of quantised ones."""
        vectors = 2 * sum(context for context, _ in self.rows) * self.heads.num_kv_heads
        if self.codes is None:
            return vectors * self.heads.dim * self.dtype.itemsize
        return vectors * (self.heads.dim * self.codes.itemsize + torch.float32.itemsize)

    @property
    def engine(self) -> str:
        """Ours, in the words of a line."""
        return "paged" if self.codes is None else f"paged, {_name(self.codes)} pages"

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class OpArguments:
    """The tensors of a call; `make_arguments` makes them."""

    query: torch.Tensor  # [num_tokens, num_heads, dim]
    key: torch.Tensor  # [num_tokens, num_kv_heads, dim]
    value: torch.Tensor  # [num_tokens, num_kv_heads, dim]
    key_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, dim]
    value_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, dim]
    slot_mapping: torch.Tensor  # [num_tokens] int64
    block_tables: torch.Tensor  # [num_rows, max_blocks] int64
    context_lens: torch.Tensor  # [num_rows] int64
    cu_seqlens_q: torch.Tensor  # [num_rows + 1] int64
    scale: float
    options: OpOptions
    sinks: torch.Tensor | None  # [num_heads]
    scales: tuple[torch.Tensor, ...]  # Of quantised keys and values, each [num_blocks, num_kv_heads, block_size, 1].

    def write_and_attend(self) -> tuple:
        """The arguments of `ops.write_and_attend`."""
        states = (self.query, self.key, self.value, self.key_cache, self.value_cache, self.slot_mapping)
        return (*states, *self._rows())

    def attend(self) -> tuple:
        """The arguments of `ops.paged_attention`."""
        return (self.query, self.key_cache, self.value_cache, *self._rows())

    def _rows(self) -> tuple:
        lengths = (self.block_tables, self.context_lens, self.cu_seqlens_q)
        return (*lengths, self.scale, self.options.window, self.options.softcap, self.sinks, *self.scales)


def make_arguments(case: OpCase, device: torch.device, seed: int = 0, with_nan: bool = True) -> OpArguments:
    """Make the arguments of a call.

    Each row's blocks lie in random order. Slots of tokens that are there before the call hold random states.

    Parameters
    ----------
    with_nan : bool
        All other slots, those of the new tokens included, hold NaN; else every slot holds random states.
    """
    size, heads = case.block_size, case.heads
    widths = [-(-context // size) for context, _ in case.rows]
    order = torch.randperm(sum(widths) + 1, generator=torch.Generator().manual_seed(seed))
    tables = torch.full((len(case.rows), max([1, *widths])), int(order[-1]))  # [num_rows, max_blocks]
    is_stored = torch.zeros(len(order) * size, dtype=torch.bool)
    slots, used = [], 0
    for row, (context, queries) in enumerate(case.rows):
        tables[row, : widths[row]] = order[used : used + widths[row]]
        used += widths[row]
        at = torch.arange(context)
        row_slots = tables[row, at // size] * size + at % size
        is_stored[row_slots[: context - queries]] = True
        slots.append(row_slots[context - queries :])
    generator = torch.Generator(device).manual_seed(seed)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, heads.dim, device=device, dtype=case.dtype, generator=generator)

    caches, scales = [states(len(order), heads.num_kv_heads, size) for _ in "kv"], []
    if case.codes is not None:
        caches, scales = map(list, zip(*(quantize(x, case.codes) for x in (rotate(caches[0]), caches[1]))))
    if with_nan:
        is_empty = ~is_stored.view(-1, 1, size, 1).to(device)  # [num_blocks, 1, block_size, 1]
        for cache in scales or caches:
            cache.masked_fill_(is_empty, float("nan"))
    return OpArguments(
        query=states(case.num_tokens, heads.num_heads),
        key=states(case.num_tokens, heads.num_kv_heads),
        value=states(case.num_tokens, heads.num_kv_heads),
        key_cache=caches[0],
        value_cache=caches[1],
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        context_lens=torch.tensor([context for context, _ in case.rows]).to(device),
        cu_seqlens_q=torch.tensor([0] + [queries for _, queries in case.rows]).cumsum(0).to(device),
        scale=heads.dim**-0.5,
        options=case.options,
        sinks=states(heads.num_heads)[:, 0].contiguous() if case.options.has_sinks else None,
        scales=tuple(scales),
    )
