"""The packed step: tokens of many rows in one ragged forward ``[1, total]``, and how its layers attend.

On this path a cache layer's ``update`` returns the new states untouched, and the attention function writes
and reads with one op, found by the layer's index in the step that the model's call carries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.reasons import Reason, Why
from hf_paged.scheduling.scheduler import Chunk

ARGUMENT = "hf_paged_step"  # The keyword under which a step travels from the model's call to its attention.
PACKED_OFFSET = -1  # No mask begins there: by it the mask function knows a packed step, with no state to trace.


class NotPackableError(Exception):
    """This model does something between its cache and its attention that a packed step cannot follow."""

    def __init__(self, why: Why):
        self.why = why
        super().__init__(why.text)


@dataclass(frozen=True)
class GroupStep:
    """Arguments of `ops.write_and_attend` that describe the rows in one attention group."""

    window: int | None
    slot_mapping: torch.Tensor  # [total] int64
    block_tables: torch.Tensor  # [rows, max_blocks] int64
    context_lens: torch.Tensor  # [rows] int64
    cu_seqlens_q: torch.Tensor  # [rows + 1] int64


@dataclass
class StepInputs:
    """One step: what the model runs, and where its layers write and read.

    Attributes
    ----------
    input_ids, position_ids : torch.Tensor
        ``[1, total]`` int64; positions count within each row.
    sample_index : torch.Tensor
        ``[samples]`` int64: the tokens whose logits are wanted.
    layers : dict of int to (KVStorage, GroupStep)
        By cache layer.
    fresh : dict of int to (key, value)
        What `update` was given, until attention has used it.
    page_reads : int
        Attention calls so far.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_index: torch.Tensor
    layers: dict[int, tuple[KVStorage, GroupStep]]
    fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    page_reads: int = 0

    def attend(self, module, query, key, value, mask, scaling, kwargs) -> torch.Tensor:
        """Store the new states of one layer and attend over its pages.

        Parameters
        ----------
        query, key, value : torch.Tensor
            ``[1, heads, total, head_dim]``, as the attention function got them.

        Returns
        -------
        torch.Tensor
            ``[1, total, num_heads, value_dim]``

        Raises
        ------
        NotPackableError
            If these are not the states that `update` got, or the call asks for more than causal attention.
        """
        index = getattr(module, "layer_idx", None)
        fresh = self.fresh.pop(index, (None, None))
        if fresh[0] is not key or fresh[1] is not value:
            raise NotPackableError(Reason.EARLY_COMPUTATION)
        storage, group = self.layers[index]
        if key.dtype != storage.states_dtype or key.device != storage.device:
            raise NotPackableError(Reason.CHANGED_PLACE)
        if not is_packed_mask(mask) or not (torch.compiler.is_compiling() or mask.shape[3] == (group.window or 0)):
            raise NotPackableError(Reason.OTHER_PATTERN)
        sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
        self.page_reads += 1
        out = storage.write_and_attend(
            *(states[0].transpose(0, 1) for states in (query, key, value)),  # [total, heads, head_dim]
            group.slot_mapping,
            group.block_tables,
            group.context_lens,
            group.cu_seqlens_q,
            query.shape[3] ** -0.5 if scaling is None else scaling,
            group.window,
            kwargs.get("softcap"),
            sinks,
        )
        return out[None]


def packed_mask(window: int | None, device: torch.device) -> torch.Tensor:
    """A mask without content: the step knows the rows, the last dimension says which window a layer was given.

    Returns
    -------
    torch.Tensor
        ``[1, 1, 0, window]``, 0 for no window.
    """
    return torch.empty(1, 1, 0, window or 0, device=device)


def is_packed_mask(mask: torch.Tensor | None) -> bool:
    """Whether `packed_mask` made this: no other mask is for no queries."""
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 0


class _PackedMixin:
    step: StepInputs
    index: int

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Hand the new states on untouched; attention stores them."""
        self.step.fresh[self.index] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, PACKED_OFFSET


class PackedLayer(_PackedMixin, DynamicLayer):
    """A full-attention layer of a packed step."""


class PackedSlidingWindowLayer(_PackedMixin, DynamicSlidingWindowLayer):
    """A sliding-window layer of a packed step."""


class PackedCache(Cache):
    """The cache that a packed forward is given: it stores nothing, its step does.

    Parameters
    ----------
    step : StepInputs
    windows : sequence of int or None
        The sliding window of each cache layer.
    """

    def __init__(self, step: StepInputs, windows: Sequence[int | None]):
        layers = []
        for index, window in enumerate(windows):
            layer = PackedLayer() if window is None else PackedSlidingWindowLayer(sliding_window=window)
            layer.step, layer.index = step, index
            layers.append(layer)
        super().__init__(layers=layers)


def pack(chunks: Sequence[Chunk], windows, storages, buffers: StepBuffers) -> StepInputs:
    """Describe a step's chunks as tensors.

    Parameters
    ----------
    chunks : sequence of Chunk
    windows : list of int or None
        The window of each attention group, in the order of the requests' tables.
    storages : list of dict of int to KVStorage
        For each group its layers.
    buffers : StepBuffers
        Filled: the step before, if it was packed into the same, is over.
    """
    tokens = [token for chunk in chunks for token in chunk.request.tokens[chunk.start : chunk.end]]
    positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
    ends = np.cumsum([chunk.end - chunk.start for chunk in chunks])
    samples = [end - 1 for chunk, end in zip(chunks, ends.tolist()) if chunk.samples]
    starts = buffers.fill("cu_seqlens_q", np.concatenate([[0], ends]))
    layers = {}
    for number, (window, layer_storages) in enumerate(zip(windows, storages)):
        rows = [(chunk, chunk.request.tables[number]) for chunk in chunks]
        slots, tables, lens = (
            buffers.fill(f"{name} {number}", values)
            for name, values in zip(("slot_mapping", "block_tables", "context_lens"), _places(rows))
        )
        group = GroupStep(window, slots, tables, lens, starts)
        layers.update({index: (storage, group) for index, storage in layer_storages.items()})
    return StepInputs(
        buffers.fill("input_ids", np.array([tokens])),
        buffers.fill("position_ids", positions[None]),
        buffers.fill("sample_index", np.array(samples, dtype=np.int64)),
        layers,
    )


def _places(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slot mapping, block tables and context lengths of (chunk, block table) pairs."""
    tables = np.zeros((len(rows), max(len(table.blocks) for _, table in rows)), dtype=np.int64)
    slots = []
    for row, (chunk, table) in enumerate(rows):
        blocks, size = table.blocks, table.pool.block_size
        tables[row, : len(blocks)] = blocks
        if chunk.end - chunk.start == 1:
            at = chunk.start - table.base
            slots.append(np.array([blocks[at // size] * size + at % size]))
        else:
            at = np.arange(chunk.start, chunk.end) - table.base
            slots.append(tables[row, at // size] * size + at % size)
    lens = np.array([chunk.end - table.base for chunk, table in rows], dtype=np.int64)
    return np.concatenate(slots), tables, lens


def run_step(model: Callable, step: StepInputs) -> torch.Tensor:
    """The model's logits where `step` wants them, ``[samples, vocab]``.

    Raises
    ------
    NotPackableError
        If the model's layers did not attend through the step.
    """
    layer_windows = {index: group.window for index, (_, group) in step.layers.items()}
    windows = [layer_windows.get(index) for index in range(max(layer_windows) + 1)]
    output = model(
        input_ids=step.input_ids,
        position_ids=step.position_ids,
        past_key_values=PackedCache(step, windows),
        logits_to_keep=step.sample_index,
        use_cache=True,
        return_dict=True,
        **{ARGUMENT: step},
    )
    if step.fresh or step.page_reads != len(step.layers):
        raise NotPackableError(Reason.OWN_ATTENTION)
    return output.logits[0]
