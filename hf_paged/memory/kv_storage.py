"""The tensors behind the block ids: one K and one V tensor for each attention layer."""

import mmap
import sys

import torch

from hf_paged.errors import PagedError

_MAP_NORESERVE = 0x4000  # Linux's. Python has no name for it before 3.13.


class KVStorage:
    """Keys and values of one attention layer, ``[num_blocks, num_kv_heads, block_size, head_dim]``.

    On the CPU the whole capacity is reserved once as virtual memory: addresses never move, and a page
    costs nothing until a token is written to it. Elsewhere the tensors grow by doubling, with a copy, and
    not past the budget before they must; the owner calls `ensure` between steps only, under its lock.

    Parameters
    ----------
    num_kv_heads, key_dim, value_dim, block_size : int
        Shape of a block; key and value head sizes may differ.
    dtype : torch.dtype
    device : torch.device
    capacity : int
        Blocks that the storage may ever hold.
    budget : int or None
        Blocks that it holds at most while no more are asked for; None: `capacity`.
    """

    def __init__(self, num_kv_heads, key_dim, value_dim, block_size, dtype, device, capacity, budget=None):
        self.dtype, self.device, self.capacity = dtype, device, capacity
        self.budget = capacity if budget is None else min(budget, capacity)
        self._shapes = [(num_kv_heads, block_size, dim) for dim in (key_dim, value_dim)]
        num_blocks = capacity if device.type == "cpu" else 0
        self._caches = tuple(self._new(num_blocks, shape) for shape in self._shapes)

    @property
    def key_cache(self) -> torch.Tensor:
        """``[num_blocks, num_kv_heads, block_size, key_dim]``"""
        return self._caches[0]

    @property
    def value_cache(self) -> torch.Tensor:
        """``[num_blocks, num_kv_heads, block_size, value_dim]``"""
        return self._caches[1]

    @property
    def num_blocks(self) -> int:
        """Blocks that are addressable."""
        return len(self._caches[0])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return sum(heads * size * dim for heads, size, dim in self._shapes) * self.dtype.itemsize

    def accepts(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether states ``[batch, num_kv_heads, tokens, head_dim]`` can be stored here unchanged."""
        return all(
            states.dtype == self.dtype
            and states.device == self.device
            and (states.shape[1], states.shape[3]) == (shape[0], shape[2])
            for states, shape in zip((key, value), self._shapes, strict=True)
        )

    def ensure(self, num_blocks: int) -> None:
        """Make blocks ``0 .. num_blocks - 1`` addressable. Replaces both tensors if they must grow, or neither.

        Raises
        ------
        torch.OutOfMemoryError
            If the device has no memory for them. The storage is left as it was.
        """
        held = self.num_blocks
        if num_blocks <= held:
            return
        size = max(num_blocks, min(2 * held, self.budget))
        grown = tuple(self._new(size, shape) for shape in self._shapes)
        for new, old in zip(grown, self._caches, strict=True):
            new[:held] = old
        self._caches = grown  # At once: keys and values of different sizes would be read past their end.

    def _new(self, num_blocks: int, shape: tuple[int, int, int]) -> torch.Tensor:
        # A pool made under inference_mode could not be written in place outside it.
        with torch.inference_mode(False):
            if self.device.type != "cpu" or num_blocks == 0:
                return torch.empty(num_blocks, *shape, dtype=self.dtype, device=self.device)
            count = num_blocks * shape[0] * shape[1] * shape[2]
            memory = _reserve(count * self.dtype.itemsize)
            return torch.frombuffer(memory, dtype=self.dtype, count=count).view(num_blocks, *shape)


def _reserve(num_bytes: int) -> mmap.mmap:
    """Address space without memory behind it yet; freed with the last tensor that views it."""
    # Private: a forked child that writes gets its own copy instead of its parent's pages.
    # Not reserved: with it in the books as memory that is needed, the system would refuse any fork.
    options = {}
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
