"""StepBuffers: the arena in which the tensors of a step lie, allocated once and filled anew for every step.

All of them are int64 and lie in one tensor, so that one copy brings a step to its device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.execution.host_tables import HostTables
from hf_paged.memory.block_table import BlockTable

_ALIGNMENT = 16  # Elements between the beginnings of tensors: 128 bytes, a line of a GPU's cache.
_LEAST = 64  # Tokens, and entries of a block table, that there is room for from the start.
_LEAST_ROWS = 16


@dataclass(frozen=True)
class StepSize:
    """How large a step is, or how large a step may be.

    Attributes
    ----------
    num_tokens : int
    num_rows : int
        No more of them are sampled.
    table_widths : tuple of int
        By KV cache group: the blocks of its longest row.
    """

    num_tokens: int
    num_rows: int
    table_widths: tuple[int, ...]

    def fits(self, room: "StepSize") -> bool:
        """Tell whether a step of this size has room there."""
        return (
            self.num_tokens <= room.num_tokens
            and self.num_rows <= room.num_rows
            and len(self.table_widths) == len(room.table_widths)
            and all(width <= most for width, most in zip(self.table_widths, room.table_widths))
        )

    def with_room_for(self, other: "StepSize") -> "StepSize":
        """This room, with each size that is too small for `other` at the next power of two: few steps outgrow it."""
        widths = self.table_widths or (_LEAST,) * len(other.table_widths)
        return StepSize(
            _room(self.num_tokens, other.num_tokens),
            _room(self.num_rows, other.num_rows),
            tuple(_room(width, needed) for width, needed in zip(widths, other.table_widths, strict=True)),
        )


def _room(held: int, needed: int) -> int:
    return held if needed <= held else 1 << (needed - 1).bit_length()


class StepLayout:
    """Where each tensor of a step lies in an arena, in elements. It follows from the room alone.

    The block tables of all groups are the columns of one matrix ``[num_rows, table_stride]`` at the end: a copy that
    stops behind the last row in use leaves nothing out.

    Parameters
    ----------
    room : StepSize

    Attributes
    ----------
    places : dict of str to slice
        By the tensor's name, with the number of its group where it has one: ``"slot_mapping 0"``.
    columns : list of slice
        By group: the columns of its block tables in the matrix.
    tables : int
        Where the matrix begins.
    table_stride : int
        From one row of it to the next.
    num_elements : int
        Of the arena.
    """

    def __init__(self, room: StepSize):
        self.room = room
        sizes = {
            "input_ids": room.num_tokens,
            "position_ids": room.num_tokens,
            "sample_index": room.num_rows,
            "cu_seqlens_q": room.num_rows + 1,
        }
        for number in range(len(room.table_widths)):
            sizes[f"slot_mapping {number}"] = room.num_tokens
            sizes[f"context_lens {number}"] = room.num_rows
        self.places: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.places[name] = slice(end, end + size)
            end = _aligned(end + size)
        self.tables = end
        self.columns: list[slice] = []
        end = 0
        for width in room.table_widths:
            self.columns.append(slice(end, end + width))
            end = _aligned(end + width)
        self.table_stride = end
        self.num_elements = self.end(room.num_rows)

    def end(self, num_rows: int) -> int:
        """Behind the last element of a step of that many rows."""
        return self.tables + num_rows * self.table_stride


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


class StepBuffers:
    """The tensors of the steps of one engine, in one arena: every step has its tensors at the same addresses.

    A step's tensors are good until the next step is prepared: `begin`, `show_tables`, `upload`. On the CPU the arena
    that is filled is the one that is used. Elsewhere there are two arenas on the host, which take turns: one can be
    filled while the other is still being copied. On the device there is one, and the copy takes its turn in the current
    stream, behind the step that reads what was there before.

    The copy takes the block tables whole, though the host writes little of them: 256 rows of 8,192 tokens in blocks of
    16 are 1 MiB, some 30 us at the nominal rate of PCIe 4.0. To send what changed, and to apply it with a kernel, would
    save less than it costs the host to launch that, until tables are several times as large.

    Parameters
    ----------
    device : torch.device
        Where the tensors go.
    room : StepSize or None
        Of the largest step that is expected. A larger one is served all the same, and moves the arena. None: it grows
        with the steps.
    """

    def __init__(self, device: torch.device, room: StepSize | None = None):
        self.device = device
        self._arena = _Arena(room or StepSize(_LEAST, _LEAST_ROWS, ()), device)

    @property
    def room(self) -> StepSize:
        """Of the largest step so far, rounded up. While it is the same, so are all addresses."""
        return self._arena.layout.room

    def begin(self, size: StepSize) -> dict[str, np.ndarray]:
        """Make room for the next step. The tensors of the step before are not good any more.

        Returns
        -------
        dict of str to np.ndarray
            By the names of `StepLayout.places`: int64, with room for more than this step. They hold what was there
            before.
        """
        if not size.fits(self.room):
            self._arena = _Arena(self.room.with_room_for(size), self.device)
        self._arena.take_turns()
        return self._arena.host.arrays

    def show_tables(self, groups: list[list[BlockTable]]) -> list[np.ndarray]:
        """Put the block tables of the step's rows, by group, where they belong: see `HostTables.show`."""
        return self._arena.host.tables.show(groups)

    def upload(self, num_rows: int) -> None:
        """Bring the step to its device, with one copy that nothing waits for."""
        self._arena.upload(num_rows)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of the step, contiguous, in that shape."""
        layout = self._arena.layout
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return self._arena.tensor(name, layout.places[name].start, shape, strides)

    def block_tables(self, number: int, num_rows: int, width: int) -> torch.Tensor:
        """The block tables of a group, ``[num_rows, width]``: rows are dense, and lie `table_stride` apart."""
        layout = self._arena.layout
        start = layout.tables + layout.columns[number].start
        return self._arena.tensor(f"block_tables {number}", start, (num_rows, width), (layout.table_stride, 1))


class _Arena:
    """Memory for steps up to a size, on the host and on the device."""

    def __init__(self, room: StepSize, device: torch.device):
        self.layout = StepLayout(room)
        self.host = _HostArena(self.layout, device)
        if device.type == "cpu":
            self._others: list[_HostArena] = []
            self._memory = self.host.memory
        else:
            self._others = [_HostArena(self.layout, device)]
            self._memory = torch.empty(self.layout.num_elements, dtype=torch.long, device=device)
        self._tensors: dict[str, torch.Tensor] = {}

    def take_turns(self) -> None:
        """Make another host arena, if there is one, the one to fill; wait until it was copied."""
        if self._others:
            self.host, self._others = self._others[0], [self.host]
            self.host.wait()

    def upload(self, num_rows: int) -> None:
        if self._others:
            self.host.copy_to(self._memory, self.layout.end(num_rows))

    def tensor(self, name: str, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """The tensor that begins at an element. The same object while its shape is the same."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            # No view: a compiler would guard on the size of what it is a view of.
            tensor = self._memory.new_empty(0).set_(self._memory.untyped_storage(), start, shape, strides)
            self._tensors[name] = tensor
        return tensor


class _HostArena:
    """An arena in the host's memory, and the last copy of it to the device.

    For an accelerator it is pinned: only then does a copy not hold the host up.
    """

    def __init__(self, layout: StepLayout, device: torch.device):
        self.device = device
        accelerator = torch.accelerator.current_accelerator()
        is_pinned = accelerator is not None and accelerator.type == device.type
        self.memory = torch.zeros(layout.num_elements, dtype=torch.long, pin_memory=is_pinned)
        array = self.memory.numpy()
        self.arrays = {name: array[place] for name, place in layout.places.items()}
        tables = array[layout.tables :].reshape(layout.room.num_rows, layout.table_stride)
        self.tables = HostTables([tables[:, columns] for columns in layout.columns])
        self._copied = torch.Event(device) if is_pinned else None
        self._is_recorded = True  # Whether the event tells of the last copy: an interrupt may come before it does.

    def copy_to(self, memory: torch.Tensor, num_elements: int) -> None:
        """Copy the first elements to the device, in the order of the current stream."""
        if self._copied is None:
            memory[:num_elements].copy_(self.memory[:num_elements])
            return
        self._is_recorded = False
        memory[:num_elements].copy_(self.memory[:num_elements], non_blocking=True)
        self._copied.record(torch.accelerator.current_stream(self.device))
        self._is_recorded = True

    def wait(self) -> None:
        """Wait until the last copy has read this memory: it has long done so where steps are not far ahead."""
        if self._copied is None:
            return
        if not self._is_recorded:
            torch.accelerator.synchronize(self.device)
        elif not self._copied.query():
            self._copied.synchronize()
