"""StepInputs: the tokens of one packed step as tensors, and where its layers write and read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.scheduling.scheduler import Chunk


@dataclass(frozen=True)
class StepShape:
    """The sizes of a decode step whose tensors have room for more rows than it has, and for longer ones.

    Attributes
    ----------
    num_rows : int
        Rows, of one token each, those that pad the step included.
    widths : tuple of int
        Blocks in a row of the block tables, for each KV cache group.
    """

    num_rows: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class StepInputs:
    """One packed step: tokens of many rows, one after another in one ragged forward.

    Its tensors lie in `StepBuffers` and hold until the next step is prepared in the same buffers.

    Attributes
    ----------
    input_ids, position_ids : torch.Tensor
        ``[1, num_tokens]`` int64; positions count within each row.
    sample_index : torch.Tensor
        ``[num_samples]`` int64: the tokens whose logits are wanted.
    layers : dict of int to (KVStorage, AttentionMetadata)
        By cache layer. Layers of one KV cache group share their metadata.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor
    layers: dict[int, tuple[KVStorage, AttentionMetadata]]


def prepare_inputs(
    chunks: Sequence[Chunk], groups: Sequence[KVCacheGroup], buffers: StepBuffers, shape: StepShape | None = None
) -> StepInputs:
    """Describe the chunks of a step as tensors.

    Parameters
    ----------
    chunks : sequence of Chunk
        At least one. Their rows have blocks for the tokens.
    groups : sequence of KVCacheGroup
        In the order of the requests' tables.
    buffers : StepBuffers
        Filled: the step that was prepared in them before is over.
    shape : StepShape, optional
        What the step is padded to: chunks of one token each, all of which sample. A row that pads it has the slot -1
        and no context, so it stores nothing; the logits of such rows mean nothing.
    """
    tokens = [token for chunk in chunks for token in chunk.request.tokens[chunk.start : chunk.end]]
    starts = np.array([chunk.start for chunk in chunks])
    lengths = np.array([chunk.end for chunk in chunks]) - starts
    ends = np.cumsum(lengths)
    row_of = np.repeat(np.arange(len(chunks)), lengths)  # [num_tokens]
    positions = np.arange(len(tokens)) + (starts - ends + lengths)[row_of]
    samples = [end - 1 for chunk, end in zip(chunks, ends.tolist()) if chunk.samples]
    num_rows = len(chunks) if shape is None else shape.num_rows
    if shape is not None:
        ends, samples = np.arange(1, num_rows + 1), list(range(num_rows))
    cu_seqlens_q = buffers.fill("cu_seqlens_q", np.concatenate([[0], ends]))
    layers: dict[int, tuple[KVStorage, AttentionMetadata]] = {}
    for number, group in enumerate(groups):
        tables = [chunk.request.tables[number] for chunk in chunks]
        slot_mapping, block_tables, context_lens = _locate(tables, row_of, positions, starts + lengths)
        if shape is not None:
            slot_mapping, context_lens = _pad(slot_mapping, num_rows, filler=-1), _pad(context_lens, num_rows)
            block_tables = _pad(block_tables, num_rows, shape.widths[number])
        metadata = AttentionMetadata(
            buffers.fill(f"slot_mapping {number}", slot_mapping),
            buffers.fill(f"block_tables {number}", block_tables),
            buffers.fill(f"context_lens {number}", context_lens),
            cu_seqlens_q,
            group.window,
        )
        layers.update({index: (storage, metadata) for index, storage in group.layers.items()})
    num_tokens = len(tokens) if shape is None else num_rows
    return StepInputs(
        buffers.fill("input_ids", _pad(np.array([tokens]), 1, num_tokens)),
        buffers.fill("position_ids", _pad(positions[None], 1, num_tokens)),
        buffers.fill("sample_index", np.array(samples, dtype=np.int64)),
        layers,
    )


def _pad(values: np.ndarray, *sizes: int, filler: int = 0) -> np.ndarray:
    """An array of these sizes: `values` first, and behind them the filler."""
    if values.shape == sizes:
        return values
    padded = np.full(sizes, filler, dtype=np.int64)
    padded[tuple(map(slice, values.shape))] = values
    return padded


def _locate(
    tables: Sequence[BlockTable],
    row_of: np.ndarray,  # [num_tokens]
    positions: np.ndarray,  # [num_tokens]
    ends: np.ndarray,  # [num_rows]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the tokens of a step in one KV cache group.

    Returns
    -------
    (slot_mapping, block_tables, context_lens)
        ``[num_tokens]``, ``[num_rows, max_blocks]`` and ``[num_rows]``, int64.
    """
    block_tables = np.zeros((len(tables), max(len(table.blocks) for table in tables)), dtype=np.int64)
    for row, table in enumerate(tables):
        block_tables[row, : len(table.blocks)] = table.blocks
    bases = np.array([table.base for table in tables])
    block, offset = np.divmod(positions - bases[row_of], tables[0].pool.block_size)
    return block_tables[row_of, block] * tables[0].pool.block_size + offset, block_tables, ends - bases
