"""AttentionMetadata: how the kernels find the rows of one forward in the pages of one KV cache group."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class NewRows(NamedTuple):
    """Rows of a packed step that have nothing stored before it, from one row to the last.

    Attributes
    ----------
    first_row, first_token : int
        The first of these rows, and its first token in the step.
    longest : int
        Tokens of the longest of them.
    """

    first_row: int
    first_token: int
    longest: int


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the layers of one KV cache group write and read in one forward.

    Packed steps and forwards over a cache of rows side by side are described alike. `StepInputs` has one for each
    group, whose tensors lie in the engine's `StepBuffers`; a paged cache makes new ones for each of its forwards.

    Attributes
    ----------
    slot_mapping : torch.Tensor
        ``[num_written]`` int64: slots of the tokens to store, in their order. Empty where a forward only reads. -1: the
        token pads a captured step and is not stored.
    block_tables : torch.Tensor
        ``[num_rows, max_blocks]`` int64: the blocks of each row, zeros behind the last. Those of a packed step are
        columns of a wider matrix. A row that pads a captured step holds any ids.
    context_lens : torch.Tensor
        ``[num_rows]`` int64: tokens of each row that its blocks hold, those of this forward included.
    cu_seqlens_q : torch.Tensor
        ``[num_rows + 1]`` int64: where each row's queries begin, and the number of all.
    window : int or None
        Sliding window in tokens; None: queries see all tokens before them.
    query_index : torch.Tensor or None
        ``[num_queries]`` int64: the queries among all positions ``[batch * positions]``. None: all, in order.
    new_rows : NewRows or None
        The last rows of a packed step, if they have nothing stored before it. None: not known.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    window: int | None
    query_index: torch.Tensor | None = None
    new_rows: "NewRows | None" = None

    @functools.cached_property
    def rows_in_step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block tables, context lengths and starts of `new_rows` over the tokens of the step, each a block of its own.

        Counted from the first of these tokens.
        """
        assert self.new_rows is not None, "asked for where there are new rows"
        first_row, first_token, longest = self.new_rows
        starts = self.cu_seqlens_q[first_row:] - first_token  # [num_new_rows + 1]
        tokens = starts[:-1, None] + torch.arange(longest, device=starts.device)  # [num_new_rows, longest]
        return tokens.minimum(starts[-1] - 1), starts.diff(), starts

    def on(self, device: torch.device) -> "AttentionMetadata":
        """The same with its tensors on `device`: itself if they are there."""
        if self.slot_mapping.device == device:
            return self
        return replace(
            self,
            slot_mapping=self.slot_mapping.to(device),
            block_tables=self.block_tables.to(device),
            context_lens=self.context_lens.to(device),
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            query_index=None if self.query_index is None else self.query_index.to(device),
        )
