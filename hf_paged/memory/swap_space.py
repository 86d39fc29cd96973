"""SwapSpace: where blocks lie that left their pools, a file for the pages of a CPU, host memory for those of a device.

A swap block is the place of one block of a KV cache group: the bytes of its pages in every layer, one after another. So
a block moves in one piece, however many layers there are. Which swap block holds what is for the scheduler to know.
"""

import errno
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from transformers.utils import logging

from hf_paged.compat import devices
from hf_paged.config import parse_bytes
from hf_paged.memory.kv_pool import KVPool
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.memory.swap_costs import Moved

logger = logging.get_logger(__name__)

Moves = Sequence[tuple[int, int]]  # (source, destination): from a block to a swap block, or the other way round.
_MOST_BUFFERS = 1024  # Of one call of the system, on Linux.
_CHUNK_BYTES = 64 * 2**20  # Of host memory that is taken at once: pinning a page at a time would take long.
_TIMED_EVERY = 64  # Moves of a device, of which one is timed: for that the host waits for the device.


class _Store(Protocol):
    """The swap blocks of one KV cache group."""

    block_bytes: int

    def make_room(self, moves: Moves) -> None:
        """Take the memory, or make the file, that `spill` will need. It takes long, and once."""

    def spill(self, moves: Moves) -> None:
        """Copy blocks to swap blocks. Their content is read, or on a device will be before what is queued next."""

    def restore(self, moves: Moves) -> None:
        """Copy swap blocks, each filled by `spill` before, to blocks. Mutates the pages of every layer."""

    def renew(self) -> None:
        """Let go of all that is stored."""


class SwapSpace:
    """The swap blocks of all KV cache groups of a pool.

    Called by the thread that drives the steps, outside sections: it owns the blocks that it moves meanwhile.

    Parameters
    ----------
    stores : sequence of _Store
        One per group.
    num_bytes : int
        The most that may be stored.

    Attributes
    ----------
    block_bytes : list of int
        Of a block of each group.
    num_blocks : int
        Swap blocks of each group.
    """

    def __init__(self, stores: Sequence[_Store], num_bytes: int, is_asynchronous: bool):
        self._stores = list(stores)
        self.block_bytes = [store.block_bytes for store in stores]
        self.num_blocks = num_bytes // sum(self.block_bytes)
        self._is_asynchronous, self._num_moves = is_asynchronous, 0

    def move(self, spills: Sequence[Moves], restores: Sequence[Moves]) -> Moved:
        """Spill, and then restore. Does the same if it is called again.

        Parameters
        ----------
        spills : sequence of sequence of (block, swap block)
            For each group. No block is owned by anyone who may write to it meanwhile.
        restores : sequence of sequence of (swap block, block)
            For each group. None of these swap blocks is spilled to in the same call.

        Raises
        ------
        OSError
            If the file cannot be made, written or read.
        torch.OutOfMemoryError
            If a device has no memory for what it copies.
        """
        is_timed = not self._is_asynchronous or self._num_moves % _TIMED_EVERY == 0
        self._num_moves += 1
        moved = Moved()
        with torch.inference_mode(False), torch.no_grad():
            for store, moves in zip(self._stores, spills, strict=True):
                if moves:
                    store.make_room(moves)
            began = self._now(is_timed)
            for store, moves in zip(self._stores, spills, strict=True):
                if moves:
                    store.spill(moves)
                    moved.spilled += len(moves) * store.block_bytes
            spilled = self._now(is_timed)
            for store, moves in zip(self._stores, restores, strict=True):
                if moves:
                    store.restore(moves)
                    moved.restored += len(moves) * store.block_bytes
            if is_timed:
                moved.spill_seconds, moved.restore_seconds = spilled - began, self._now(is_timed) - spilled
        return moved

    def renew(self) -> None:
        """Let go of all that is stored: in a forked child, where it is the parent's."""
        for store in self._stores:
            store.renew()

    def _now(self, is_timed: bool) -> float:
        if is_timed and self._is_asynchronous:
            torch.accelerator.current_stream().synchronize()
        return time.perf_counter()


class FileStore:
    """Swap blocks in a temporary file without a name, for pages in the host's memory.

    The pages of a block are handed to the system as they lie, and come back in the same way: nothing is copied on the
    way, and what the disk has to do is done while the system has other pages to spare.

    Parameters
    ----------
    storages : sequence of KVStorage
        The layers of the group.
    """

    def __init__(self, storages: Sequence[KVStorage]):
        pages = [page for storage in storages for page in storage.pages]
        # Rows of bytes: numpy, since torch's tensors are no buffers, and knows no bfloat16.
        rows = [page.view(torch.uint8).numpy().reshape(len(page), -1) for page in pages]
        self._parts = [rows[start : start + _MOST_BUFFERS] for start in range(0, len(rows), _MOST_BUFFERS)]
        self.block_bytes = sum(row.shape[1] for row in rows)
        self._file: int | None = None

    def make_room(self, moves: Moves) -> None:
        if self._file is not None:
            return
        if not hasattr(os, "pwritev"):
            raise OSError(errno.ENOSYS, "this system has no call that writes to a place in a file")
        self._file, path = tempfile.mkstemp(prefix="hf_paged-swap-")
        self._close = weakref.finalize(self, os.close, self._file)
        os.unlink(path)  # Its space is free when it is closed, however the process ends.

    def spill(self, moves: Moves) -> None:
        file = self._opened()
        for block, swap_block in moves:
            for buffers, offset in self._buffers(block, swap_block):
                _check(os.pwritev(file, buffers, offset), buffers, "written")

    def restore(self, moves: Moves) -> None:
        file = self._opened()
        for swap_block, block in moves:
            for buffers, offset in self._buffers(block, swap_block):
                _check(os.preadv(file, buffers, offset), buffers, "read")

    def renew(self) -> None:
        if self._file is not None:
            self._close()
            self._file = None

    def _opened(self) -> int:
        if self._file is None:
            raise OSError(errno.EBADF, "the file of the swap space is gone")
        return self._file

    def _buffers(self, block: int, swap_block: int) -> Iterator[tuple[list, int]]:
        """The pages of a block and their place in the file, as many at a time as the system takes."""
        offset = swap_block * self.block_bytes
        for part in self._parts:
            buffers = [rows[block] for rows in part]
            yield buffers, offset
            offset += sum(map(len, buffers))


def _check(count: int, buffers: list, done: str) -> None:
    """Raise an error if the system has moved less than it was asked to, as where a disk is about to be full."""
    wanted = sum(map(len, buffers))
    if count != wanted:
        raise OSError(errno.ENOSPC, f"{count:,} of {wanted:,} bytes were {done}")


class HostStore:
    """Swap blocks in the host's memory, for pages on a device: pinned, if the system pins as much.

    A block is gathered on the device and crosses in one copy, for which the host does not wait. All is queued on the
    stream that steps are queued on, so a block is read before whatever writes to it next.

    Parameters
    ----------
    storages : sequence of KVStorage
        The layers of the group.
    """

    def __init__(self, storages: Sequence[KVStorage]):
        self._storages, self._device = list(storages), storages[0].device
        shapes = [page[:0] for storage in storages for page in storage.pages]
        self._layout: list[tuple[int, int, torch.Tensor]] = []  # (start, end) of a page in a swap block, and its like.
        end = 0
        for empty in shapes:
            size = empty.shape[1:].numel() * empty.element_size()
            self._layout.append((end, end + size, empty))
            end += -(-size // 16) * 16  # So that each begins where a number of any dtype may.
        self.block_bytes = end
        self._in_chunk = max(1, _CHUNK_BYTES // self.block_bytes)
        self._chunks: list[torch.Tensor] = []  # Each [swap blocks, block_bytes] uint8.

    def make_room(self, moves: Moves) -> None:
        while len(self._chunks) * self._in_chunk <= max(swap_block for _, swap_block in moves):
            self._chunks.append(devices.host_memory((self._in_chunk, self.block_bytes)))

    def spill(self, moves: Moves) -> None:
        blocks, swap_blocks = zip(*moves)
        index = devices.upload(blocks, self._device)
        staged = torch.empty(len(moves), self.block_bytes, dtype=torch.uint8, device=self._device)
        pages = (page for storage in self._storages for page in storage.read_blocks(index))
        for (start, end, _), page in zip(self._layout, pages, strict=True):
            staged[:, start:end] = page.contiguous().view(torch.uint8).reshape(len(moves), -1)
        for row, swap_block in zip(staged, swap_blocks):
            self._place(swap_block).copy_(row, non_blocking=True)

    def restore(self, moves: Moves) -> None:
        swap_blocks, blocks = zip(*moves)
        index = devices.upload(blocks, self._device)
        staged = torch.empty(len(moves), self.block_bytes, dtype=torch.uint8, device=self._device)
        for row, swap_block in zip(staged, swap_blocks):
            row.copy_(self._place(swap_block), non_blocking=True)
        parts = [
            staged[:, start:end].contiguous().view(empty.dtype).view(len(moves), *empty.shape[1:])
            for start, end, empty in self._layout
        ]
        for storage in self._storages:
            count = len(storage.pages)
            storage.write_blocks(index, tuple(parts[:count]))
            del parts[:count]

    def renew(self) -> None:
        self._chunks = []

    def _place(self, swap_block: int) -> torch.Tensor:
        """The bytes of a swap block, ``[block_bytes]``."""
        number, row = divmod(swap_block, self._in_chunk)
        return self._chunks[number][row]


def make_swap_space(pool: KVPool) -> SwapSpace | None:
    """The swap space that the config of a pool asks for, empty; None if it asks for none, or for too little.

    Parameters
    ----------
    pool : KVPool
        Knows every KV cache group of the model, and all their layers.
    """
    num_bytes = parse_bytes(pool.config.swap_space, "swap_space")
    if num_bytes is None:
        return None
    stores = [_store_for(list(group.layers.values())) for group in pool.groups.values()]
    is_asynchronous = any(group.spec.device.type != "cpu" for group in pool.groups.values())
    space = SwapSpace(stores, num_bytes, is_asynchronous)
    if space.num_blocks == 0:
        logger.warning_once(
            f"hf_paged: swap_space is {num_bytes:,} bytes, and a block of this model takes "
            f"{sum(space.block_bytes):,}: nothing is kept there. Raise swap_space."
        )
        return None
    return space


def _store_for(storages: Sequence[KVStorage]) -> _Store:
    return FileStore(storages) if storages[0].device.type == "cpu" else HostStore(storages)
