"""AppendStep: what one forward writes and reads in one KV cache group, computed once for all its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_storage import KVStorage


def padded_block_tables(tables: Sequence[BlockTable], device: torch.device) -> torch.Tensor:
    """``[rows, max_blocks]`` int64: the blocks of each table, filled up with zeros."""
    width = max((len(table.blocks) for table in tables), default=0)
    rows = [table.blocks + [0] * (width - len(table.blocks)) for table in tables]
    return torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), width)


@dataclass(eq=False)
class AppendStep:
    """Positions ``start .. end - 1`` of every row, as one forward appends them to one KV cache group.

    Attributes
    ----------
    tables : sequence of BlockTable
        The rows' tables, with room for the new tokens.
    start, end : int
        Positions of the dense rectangle.
    first, last : list of int
        For each row, its tokens before `start` and before `end`.
    writes : dict of int to int
        By row, the first token that it stores. Rows left out share the blocks of a row with the same input.
    duplicate_of : list of int or None
        For each row the first row with the same input, whose blocks hold both; None: all rows differ.
    valid : torch.Tensor or None
        ``[batch, end - start]`` bool: which positions hold tokens; None: all.
    device : torch.device
        Of the pages.
    """

    tables: Sequence[BlockTable]
    start: int
    end: int
    first: list[int]
    last: list[int]
    writes: dict[int, int]
    duplicate_of: list[int] | None
    valid: torch.Tensor | None
    device: torch.device
    # By the window of the mask.
    _metadata: dict[int | None, AttentionMetadata] = field(default_factory=dict, init=False, repr=False)

    def write(self, storage: KVStorage, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store one layer's new states, ``[batch, num_kv_heads, positions, head_dim]``."""
        # [batch * positions, num_kv_heads, head_dim]
        key, value = (states.transpose(1, 2).flatten(0, 1) for states in (key, value))
        if self._sources is not None:
            key, value = (states.index_select(0, self._sources) for states in (key, value))
        storage.write(key, value, self._slot_mapping)

    @cached_property
    def _slot_mapping(self) -> torch.Tensor:
        """``[tokens]`` int64, the slot of each stored token."""
        slots = [slot for row, token in self.writes.items() for slot in self.tables[row].slots(token, self.last[row])]
        return torch.tensor(slots, dtype=torch.long, device=self.device)

    @cached_property
    def _sources(self) -> torch.Tensor | None:
        """``[tokens]`` int64, where the stored tokens are in ``[batch * positions]``; None: everywhere, in order."""
        positions = self.end - self.start
        if self.valid is None and list(self.writes.items()) == list(enumerate(self.first)):
            return None
        index: list[int] = []
        for row, token in self.writes.items():
            at = range(positions) if self.valid is None else self.valid[row].nonzero().flatten().tolist()
            index.extend(row * positions + position for position in at[token - self.first[row] :])
        return torch.tensor(index, dtype=torch.long, device=self.device)

    @cached_property
    def has_inner_padding(self) -> bool:
        """Tell whether some new position is padding that comes after a token of its row, in this step or before.

        The other queries of such a row are not the last tokens of its context.
        """
        if self.valid is None or self.end - self.start == 1:
            return False
        after_new = (self.valid[:, :-1] & ~self.valid[:, 1:]).any(1).tolist()
        is_padded = (~self.valid.all(1)).tolist()
        return any(new or (pads and past > 0) for new, pads, past in zip(after_new, is_padded, self.first))

    def metadata(self, window: int | None) -> AttentionMetadata:
        """Describe the rows to attention, for a mask of that window. Only valid without inner padding."""
        if window not in self._metadata:
            block_tables, context_lens, cu_seqlens_q, query_index = self._rows
            self._metadata[window] = AttentionMetadata(
                self._slot_mapping, block_tables, context_lens, cu_seqlens_q, window, query_index
            )
        return self._metadata[window]

    @cached_property
    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Block tables, context lengths, starts and index of the queries, as `AttentionMetadata` has them."""
        positions, batch = self.end - self.start, len(self.tables)
        context_lens = [last - table.base for last, table in zip(self.last, self.tables)]
        query_index, counts = None, torch.full((batch,), positions)
        if self.valid is not None and positions > 1:
            query_index = self.valid.flatten().nonzero().flatten().to(self.device)
            counts = self.valid.sum(1).cpu()
        cu_seqlens_q = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return (
            padded_block_tables(self.tables, self.device),
            torch.tensor(context_lens, dtype=torch.long, device=self.device),
            cu_seqlens_q.to(self.device),
            query_index,
        )
