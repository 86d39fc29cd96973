"""Step: what one forward writes and reads in one attention group, computed once for all its layers.

A step knows slots and tables, not handles: a packed forward of many rows can be described by one as well,
and an attention function that finds it by other means than its keys can write and read with it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_storage import KVStorage


@dataclass(frozen=True)
class Reads:
    """Arguments of `ops.paged_attention` that describe the rows."""

    block_tables: torch.Tensor  # [batch, max_blocks] int64
    context_lens: torch.Tensor  # [batch] int64
    cu_seqlens_q: torch.Tensor  # [batch + 1] int64
    query_index: torch.Tensor | None  # [num_queries] int64 into [batch * positions]; None: all, in order


class AppendStep:
    """Positions ``start .. end - 1`` of every row, as one forward appends them to one attention group.

    Parameters
    ----------
    tables : sequence of BlockTable
        The rows' tables, with room for the new tokens.
    start, end : int
        Positions of the dense rectangle.
    first, last : list of int
        For each row, its tokens before `start` and before `end`.
    writes : dict of int to int
        For each row that stores tokens of its own, the first token it stores. Rows left out share the
        blocks of a row with the same input.
    twins : list of int or None
        For each row the row whose blocks hold it, where rows have the same input; None: no two do.
    valid : torch.Tensor or None
        ``[batch, end - start]`` bool: which positions hold tokens; None: all.
    """

    def __init__(
        self,
        tables: Sequence[BlockTable],
        start: int,
        end: int,
        first: list[int],
        last: list[int],
        writes: dict[int, int],
        twins: list[int] | None,
        valid: torch.Tensor | None,
        device: torch.device,
    ):
        self.tables, self.start, self.end = tables, start, end
        self.first, self.last, self.writes, self.twins = first, last, writes, twins
        self.valid, self.device = valid, device

    def write(self, storage: KVStorage, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store one layer's new states, ``[batch, num_kv_heads, positions, head_dim]``."""
        tokens = [states.transpose(1, 2).flatten(0, 1) for states in (key, value)]  # [batch * positions, heads, dim]
        if self._sources is not None:
            tokens = [states.index_select(0, self._sources) for states in tokens]
        storage.write(*tokens, self._slot_mapping)

    @cached_property
    def _slot_mapping(self) -> torch.Tensor:
        slots = [slot for row, token in self.writes.items() for slot in self.tables[row].slots(token, self.last[row])]
        return torch.tensor(slots, dtype=torch.long, device=self.device)

    @cached_property
    def _sources(self) -> torch.Tensor | None:
        """Where the stored tokens are in ``[batch * positions]``; None: everywhere, in order."""
        positions = self.end - self.start
        if self.valid is None and list(self.writes.items()) == list(enumerate(self.first)):
            return None
        index = []
        for row, token in self.writes.items():
            at = range(positions) if self.valid is None else self.valid[row].nonzero().flatten().tolist()
            index.extend(row * positions + position for position in at[token - self.first[row] :])
        return torch.tensor(index, dtype=torch.long, device=self.device)

    @cached_property
    def has_inner_padding(self) -> bool:
        """Whether some new position is padding that a later token of its row, or of the past, surrounds.

        The queries of such positions are not the last tokens of their row's context.
        """
        if self.valid is None or self.end - self.start == 1:
            return False
        leading = (self.valid[:, :-1] & ~self.valid[:, 1:]).any(1)
        padded = ~self.valid.all(1)
        return any(inner or (pads and past) for inner, pads, past in zip(leading.tolist(), padded.tolist(), self.first))

    @cached_property
    def reads(self) -> Reads:
        """How attention reads the rows. Only valid without inner padding."""
        positions, batch = self.end - self.start, len(self.tables)
        width = max((len(table.blocks) for table in self.tables), default=0)
        block_tables = [table.blocks + [0] * (width - len(table.blocks)) for table in self.tables]
        context_lens = [last - table.base for last, table in zip(self.last, self.tables)]
        query_index, counts = None, torch.full((batch,), positions)
        if self.valid is not None and positions > 1:
            query_index = self.valid.flatten().nonzero().flatten().to(self.device)
            counts = self.valid.sum(1).cpu()
        cu_seqlens_q = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return Reads(
            torch.tensor(block_tables, dtype=torch.long, device=self.device).view(batch, width),
            torch.tensor(context_lens, dtype=torch.long, device=self.device),
            cu_seqlens_q.to(self.device),
            query_index,
        )
