"""StepInputs: the tokens of one packed step as tensors, and where its layers write and read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_paged.execution.attention_metadata import AttentionMetadata, NewRows
from hf_paged.execution.step_buffers import StepBuffers, StepSize
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.scheduling.scheduler import Chunk


@dataclass(frozen=True)
class StepInputs:
    """One packed step: tokens of many rows, one after another in one ragged forward.

    Its tensors lie in `StepBuffers` and hold until the next step is prepared in the same buffers.

    Attributes
    ----------
    input_ids, position_ids : torch.Tensor
        ``[1, num_tokens]`` int64; positions count within each row.
    sample_index : torch.Tensor or list of int
        ``[num_samples]`` int64: the tokens whose logits are wanted. A list where layers are on several devices: hooks
        bring tensors to the first of them, and what the last layer returns cannot be indexed by those.
    layers : dict of int to (KVStorage, AttentionMetadata)
        By cache layer. Layers of one KV cache group share their metadata.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor | list[int]
    layers: dict[int, tuple[KVStorage, AttentionMetadata]]


def prepare_inputs(
    chunks: Sequence[Chunk],
    groups: Sequence[KVCacheGroup],
    buffers: StepBuffers,
    padded_to: StepSize | None = None,
) -> StepInputs:
    """Describe the chunks of a step as tensors, and bring them to their device with one copy.

    Parameters
    ----------
    chunks : sequence of Chunk
        At least one. Their rows have blocks for the tokens.
    groups : sequence of KVCacheGroup
        In the order of the requests' tables.
    buffers : StepBuffers
        Filled: what reads the step that was prepared in them before is under way on the device, or over.
    padded_to : StepSize or None
        The size of the step, for a runner that captures steps of a few sizes. Rows of one token each make up for what
        the chunks lack: they come last, are sampled, are stored nowhere (slot -1) and see nothing (context of 0).
        Block tables have that width. None: the chunks' own size.

    Raises
    ------
    ValueError
        If the chunks do not fit, or lack another number of tokens than of rows.
    """
    requests, *bounds = zip(*chunks)
    starts, ends = map(np.array, bounds)  # [num_rows]
    row_ends = np.cumsum(ends - starts)  # Behind each row's last token of the step.
    tables = [[request.tables[number] for request in requests] for number in range(len(groups))]
    own = StepSize(
        int(row_ends[-1]), len(chunks), tuple(max(len(table.blocks) for table in of_group) for of_group in tables)
    )
    size = own if padded_to is None else padded_to
    if not own.fits(size) or size.num_tokens - own.num_tokens != size.num_rows - own.num_rows:
        raise ValueError(f"rows of one token do not pad a step of {own} to {size}: run it as it is")
    row_of = np.repeat(np.arange(own.num_rows), ends - starts)  # [num_tokens]
    positions = np.arange(own.num_tokens) + (ends - row_ends)[row_of]
    samples = [end - 1 for chunk, end in zip(chunks, row_ends.tolist()) if chunk.samples]

    host = buffers.begin(size)
    host["input_ids"][: own.num_tokens] = [token for chunk in chunks for token in chunk.tokens]
    host["position_ids"][: own.num_tokens] = positions
    host["sample_index"][: len(samples)] = samples
    host["cu_seqlens_q"][0] = 0
    host["cu_seqlens_q"][1 : own.num_rows + 1] = row_ends
    block_tables = buffers.show_tables(tables)
    for number, of_group in enumerate(tables):
        block_size = of_group[0].pool.block_size
        bases = np.array([table.base for table in of_group])  # [num_rows]
        block, offset = np.divmod(positions - bases[row_of], block_size)
        slots = block_tables[number][row_of, block] * block_size + offset
        host[f"slot_mapping {number}"][: own.num_tokens] = slots
        host[f"context_lens {number}"][: own.num_rows] = ends - bases
    num_samples = len(samples) + _pad(host, own, size, len(samples))
    buffers.upload(size.num_rows)
    return _as_tensors(buffers, groups, size, num_samples, _new_rows(chunks) if size is own else None)


def _new_rows(chunks: Sequence[Chunk]) -> NewRows | None:
    """The rows behind the last one that has a past, if there are any."""
    first = next((index for index in range(len(chunks), 0, -1) if chunks[index - 1].start > 0), 0)
    if first == len(chunks):
        return None
    lengths = [chunk.end - chunk.start for chunk in chunks]
    return NewRows(first, sum(lengths[:first]), max(lengths[first:]))


def _pad(host: dict[str, np.ndarray], own: StepSize, size: StepSize, num_samples: int) -> int:
    """Add rows of one token each to a step of the size `own`. Returns how many."""
    num_pads = size.num_rows - own.num_rows
    if size is own:
        return 0
    tokens, rows = slice(own.num_tokens, size.num_tokens), slice(own.num_rows, size.num_rows)
    host["input_ids"][tokens] = host["position_ids"][tokens] = 0
    host["sample_index"][num_samples : num_samples + num_pads] = np.arange(own.num_tokens, size.num_tokens)
    host["cu_seqlens_q"][own.num_rows + 1 : size.num_rows + 1] = np.arange(own.num_tokens, size.num_tokens) + 1
    for number in range(len(size.table_widths)):
        host[f"slot_mapping {number}"][tokens] = -1
        host[f"context_lens {number}"][rows] = 0
    return num_pads


def _as_tensors(
    buffers: StepBuffers,
    groups: Sequence[KVCacheGroup],
    size: StepSize,
    num_samples: int,
    new_rows: NewRows | None,
) -> StepInputs:
    """The step that `buffers` were filled with."""
    cu_seqlens_q = buffers.tensor("cu_seqlens_q", size.num_rows + 1)
    layers: dict[int, tuple[KVStorage, AttentionMetadata]] = {}
    for number, (group, width) in enumerate(zip(groups, size.table_widths)):
        metadata = AttentionMetadata(
            buffers.tensor(f"slot_mapping {number}", size.num_tokens),
            buffers.block_tables(number, size.num_rows, width),
            buffers.tensor(f"context_lens {number}", size.num_rows),
            cu_seqlens_q,
            group.window,
            new_rows=new_rows,
        )
        layers.update({index: (storage, metadata) for index, storage in group.layers.items()})
    return StepInputs(
        buffers.tensor("input_ids", 1, size.num_tokens),
        buffers.tensor("position_ids", 1, size.num_tokens),
        buffers.tensor("sample_index", num_samples),
        layers,
    )


def on_devices_of_layers(inputs: StepInputs, chunks: Sequence[Chunk]) -> StepInputs:
    """The step of these chunks for layers that are on several devices: each finds its metadata on its own."""
    moved: dict[tuple[int, torch.device], AttentionMetadata] = {}
    layers = {}
    for index, (storage, metadata) in inputs.layers.items():
        key = id(metadata), storage.device
        if key not in moved:
            moved[key] = metadata.on(storage.device)
        layers[index] = (storage, moved[key])
    ends = itertools.accumulate(chunk.end - chunk.start for chunk in chunks)
    samples = [end - 1 for chunk, end in zip(chunks, ends) if chunk.samples]
    return replace(inputs, layers=layers, sample_index=samples)
