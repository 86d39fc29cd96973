"""AttentionMetadata: how the kernels find the rows of one forward in the pages of one KV cache group."""

from dataclasses import dataclass, replace

import torch


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
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    window: int | None
    query_index: torch.Tensor | None = None

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
