"""The tensors behind the block ids: the pages of one attention layer, and what is done with them."""

import itertools
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_paged.errors import PagedError
from hf_paged.memory.kv_format import BlockShape, KVFormat, Pages, Part
from hf_paged.memory.sizing import is_taken_at_once

_MAP_NORESERVE = 0x4000  # Linux's. Python has no name for it before 3.13.


class KVStorage:
    """Keys and values of one attention layer, in the pages of its KV format.

    All blocks are addressable from the beginning, and their addresses never move: captured steps rely on it. On the
    CPU they are reserved as virtual memory, and a page costs nothing until a token is written to it. Elsewhere they
    are allocated at once.

    Parameters
    ----------
    kv_format : KVFormat
        What the pages are, and how they are written and read.
    shape : BlockShape
        The states that a block holds.
    device : torch.device
    num_blocks : int
        Blocks that the storage holds.

    Attributes
    ----------
    pages : tuple of torch.Tensor
        Each ``[num_blocks, num_kv_heads, block_size, size]``: the parts of keys, then those of values. Never replaced.

    Raises
    ------
    torch.OutOfMemoryError
        If the device has no memory for them.
    PagedError
        If the CPU has no address space for them.
    """

    def __init__(self, kv_format: KVFormat, shape: BlockShape, device: torch.device, num_blocks: int):
        self.kv_format, self.shape, self.device, self.num_blocks = kv_format, shape, device, num_blocks
        self.states_dtype = kv_format.states_dtype
        self._reserved: list[mmap.mmap] = []  # On the CPU: the address space behind each of `pages`.
        parts = kv_format.parts(shape.key_dim) + kv_format.parts(shape.value_dim)
        self.pages: Pages = tuple(map(self._allocate, parts))
        # Bound once: a decode step calls the last of them in every layer.
        self._write, self._attend, self._write_and_attend = (
            kv_format.write,
            kv_format.attend,
            kv_format.write_and_attend,
        )

    @property
    def num_kv_heads(self) -> int:
        return self.shape.num_kv_heads

    def head_dim(self, is_key: bool) -> int:
        """Size of one head of the keys or values."""
        return self.shape.key_dim if is_key else self.shape.value_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return self.kv_format.block_bytes(self.shape)

    def accepts(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Tell whether states ``[batch, num_kv_heads, tokens, head_dim]`` can be stored here."""
        return all(
            states.dtype == self.states_dtype
            and states.device == self.device
            and (states.shape[1], states.shape[3]) == (self.num_kv_heads, self.head_dim(is_key))
            for states, is_key in ((key, True), (value, False))
        )

    def new_states(self, is_key: bool, batch: int, positions: int) -> torch.Tensor:
        """Zeros such as the model's keys or values, ``[batch, num_kv_heads, positions, head_dim]``."""
        shape = batch, self.num_kv_heads, positions, self.head_dim(is_key)
        return torch.zeros(shape, dtype=self.states_dtype, device=self.device)

    def write(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        slot_mapping: torch.Tensor,  # [num_tokens] int64
    ) -> None:
        """Store new tokens in their slots. The caller owns the blocks, each for one row only."""
        self._write(self.pages, key, value, slot_mapping)

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
        """Causal attention over the pages of some rows, as `hf_paged_kernels.ops.paged_attention`."""
        return self._attend(self.pages, query, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks)

    def write_and_attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        slot_mapping: torch.Tensor,  # [num_tokens] int64
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
        """`write`, then `attend`: what every layer of a packed step calls, once."""
        return self._write_and_attend(
            self.pages, query, key, value, slot_mapping,
            block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
        )  # fmt: skip

    def attend_latents(
        self,
        query_latent: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        query_rope: torch.Tensor,  # [num_tokens, num_heads, value_dim]
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:  # [num_tokens, num_heads, key_dim]
        """Absorbed attention where keys are latents and values their rope parts: `ops.latent_attention`."""
        return self.kv_format.attend_latents(
            self.pages, query_latent, query_rope, block_tables, context_lens, cu_seqlens_q, scale, window
        )

    def gather(self, is_key: bool, blocks: torch.Tensor) -> torch.Tensor:
        """Copy whole blocks ``[num_blocks]`` out of the pages: ``[num_blocks, num_kv_heads, block_size, head_dim]``."""
        return self.kv_format.gather(self.pages, is_key, blocks)

    def copy_blocks(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy blocks ``[num_copies]`` to others: the copy of copy-on-write."""
        self.kv_format.copy_blocks(self.pages, source, destination)

    def read_blocks(self, blocks: torch.Tensor) -> Pages:
        """Copy whole blocks out of the pages, as they lie there, to keep them elsewhere.

        Parameters
        ----------
        blocks : torch.Tensor
            ``[num_blocks]`` int64, on the storage's device.

        Returns
        -------
        tuple of torch.Tensor
            One for each of `pages`, ``[num_blocks, num_kv_heads, block_size, size]`` on the same device.
        """
        return tuple(page[blocks] for page in self.pages)

    def write_blocks(self, blocks: torch.Tensor, parts: Pages) -> None:
        """Put back what `read_blocks` has copied, into these blocks or others. Mutates them, bit for bit.

        Parameters
        ----------
        blocks : torch.Tensor
            ``[num_blocks]`` int64, on the storage's device, each once. The caller owns them, and no one else does.
        parts : tuple of torch.Tensor
            As `read_blocks` returns them, from a storage of the same format and shape. On any device.
        """
        assert len(parts) == len(self.pages), "parts of another KV format"
        for page, part in zip(self.pages, parts):
            # An assignment would convert and repeat what does not fit.
            assert part.dtype == page.dtype and part.shape == (len(blocks), *page.shape[1:]), "blocks of another shape"
            page[blocks] = part.to(page.device)

    def vacate(self, blocks: Sequence[int]) -> None:
        """Give the memory of blocks back to the system, as far as they fill its pages. What they held is lost.

        Parameters
        ----------
        blocks : sequence of int
            In rising order. No one reads them, or writes to them, meanwhile.
        """
        if sys.platform != "linux":  # Elsewhere madvise is a hint, and what it does to the content is not said.
            return
        for memory, page in zip(self._reserved, self.pages):
            block_bytes = page.stride(0) * page.dtype.itemsize
            for first, end in _runs(blocks):
                # A system page that a neighbour has a part of stays.
                start = -(-first * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                length = end * block_bytes // mmap.PAGESIZE * mmap.PAGESIZE - start
                if length > 0:
                    memory.madvise(mmap.MADV_DONTNEED, start, length)

    def _allocate(self, part: Part) -> torch.Tensor:
        shape = self.num_blocks, self.num_kv_heads, self.shape.block_size, part.size
        # A pool made under inference_mode could not be written in place outside it.
        with torch.inference_mode(False):
            if is_taken_at_once(self.device):
                return torch.empty(shape, dtype=part.dtype, device=self.device)
            count = math.prod(shape)
            memory = _reserve(count * part.dtype.itemsize)
            self._reserved.append(memory)
            return torch.frombuffer(memory, dtype=part.dtype, count=count).view(shape)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of rising numbers without a gap: the first number, and the one behind the last."""
    for _, run in itertools.groupby(enumerate(blocks), lambda placed: placed[1] - placed[0]):
        numbers = [number for _, number in run]
        yield numbers[0], numbers[-1] + 1


def _reserve(num_bytes: int) -> mmap.mmap:
    """Address space without memory behind it yet; freed with the last tensor that views it."""
    # Private: a forked child that writes gets its own copy instead of its parent's pages.
    # Not reserved: with it in the books as memory that is needed, the system would refuse any fork.
    options: dict[str, Any] = {}  # Any: from Python 3.13 on mmap has a keyword that is no int.
    if sys.platform == "linux":
        options["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    elif hasattr(mmap, "MAP_PRIVATE"):
        options["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        return mmap.mmap(-1, num_bytes, **options)
    except OSError as error:
        raise PagedError(
            f"the system refused to reserve {num_bytes / 2**20:.0f} MiB of address space for a layer's KV "
            f"({error}): set a smaller memory_budget, or raise the limit on virtual memory (ulimit -v)"
        ) from error
