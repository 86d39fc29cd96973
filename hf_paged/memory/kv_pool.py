"""KVPool: all the KV memory of one model, and the KV cache groups it is divided into."""

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from hf_paged.atomic import after_fork_in_child
from hf_paged.config import PagedConfig
from hf_paged.errors import OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.eviction import EVICTION_POLICIES
from hf_paged.memory.kv_format import BlockShape, KVFormat, make_kv_format
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.memory.reservation import Reservation
from hf_paged.memory.sizing import budget_bytes, physical_memory

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class KVCacheSpec:
    """What layers must have in common to share block tables."""

    window: int | None  # Sliding window in tokens; None: full attention.
    states_dtype: torch.dtype  # Of keys and values as the model computes them; pages are as their KV format says.
    device: torch.device


class KVCacheGroup:
    """The blocks of the layers of one spec: ids in a `BlockPool`, and the tensors of its layers.

    A block id names one block in each layer of the group.
    """

    def __init__(self, key: KVCacheSpec, config: PagedConfig, kv_format: KVFormat, bytes_per_block: int):
        self.key, self.kv_format = key, kv_format
        self.budget_blocks = max(1, budget_bytes(config, key.device) // bytes_per_block)
        # Address space past the budget: a call that cannot wait may exceed it rather than fail.
        self.capacity = max(self.budget_blocks, physical_memory(key.device) // bytes_per_block)
        cache_blocks = int(self.budget_blocks * config.prefix_cache_share)
        policy = EVICTION_POLICIES[config.eviction_policy]()
        self.blocks = BlockPool(self.budget_blocks, config.block_size, cache_blocks, policy)
        self.layers: dict[int, KVStorage] = {}

    @property
    def window(self) -> int | None:
        return self.key.window

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVStorage:
        """Storage of layer `index`, made for states ``[batch, num_kv_heads, tokens, head_dim]`` if new."""
        if index not in self.layers:
            shape = block_shape(key, value, self.blocks.block_size)
            self.layers[index] = KVStorage(self.kv_format, shape, key.device, self.capacity, self.budget_blocks)
        return self.layers[index]

    def allocate_or_grow(self, num_blocks: int, reservations: Sequence[Reservation] = ()) -> list[int]:
        """As `BlockPool.allocate`; where the budget does not hold them the pool grows, with one warning.

        Parameters
        ----------
        num_blocks : int
        reservations : sequence of Reservation
            The caller's: the blocks are taken from what these promise, as far as it goes.

        Raises
        ------
        OutOfBlocksError
            If the memory of the device cannot hold them.
        """
        for reservation in reservations:
            reservation.spend(self, num_blocks)
        try:
            return self.blocks.allocate(num_blocks)
        except OutOfBlocksError as error:
            total = self.blocks.total_blocks
            extra = num_blocks - error.free
            if total + extra > self.capacity:
                raise
            logger.warning_once(
                f"hf_paged: a call needs {total + extra} blocks and memory_budget holds {self.budget_blocks}; the pool "
                "stays larger than its budget until hf_paged.release(model). "
                "Lower the batch, or raise memory_budget with hf_paged.configure."
            )
            self.blocks.grow(extra)
            return self.blocks.allocate(num_blocks)

    def ensure(self) -> None:
        """Make every block that was ever handed out addressable in every layer. Called under the pool's lock."""
        for storage in self.layers.values():
            storage.ensure(self.blocks.high_water)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks in every layer: the copy of copy-on-write."""
        if not copies:
            return
        source, destination = torch.tensor(copies, device=self.key.device).unbind(1)
        self.ensure()
        for storage in self.layers.values():
            storage.copy_blocks(source, destination)


@dataclass
class PrefixCounts:
    """Hits of the prefix cache on a pool so far.

    Attributes
    ----------
    lookups : int
        Rows that were looked up when they started to run, preempted ones again.
    hit_tokens : int
        Tokens of these rows that were found, and not computed.
    """

    lookups: int = 0
    hit_tokens: int = 0


def block_shape(key: torch.Tensor, value: torch.Tensor, block_size: int) -> BlockShape:
    """The shape of the blocks of a layer with states ``[batch, num_kv_heads, positions, head_dim]``."""
    return BlockShape(key.shape[1], block_size, key.shape[3], value.shape[3])


class KVPool:
    """The blocks of one model (of its decoder), shared by every cache of that model.

    Owns the storage; caches own the blocks they use and give them back when they die. What changes the pool's
    state is an atomic section (`atomic.py`) and holds `lock`, which readers hold, too; storage grows only before a
    step writes to it, under `lock`.

    Parameters
    ----------
    config : PagedConfig
    """

    def __init__(self, config: PagedConfig):
        self.config = config
        self.lock = threading.RLock()
        self.groups: dict[KVCacheSpec, KVCacheGroup] = {}
        self.caches: weakref.WeakSet = weakref.WeakSet()  # Live `BatchState`, and engines.
        self.engines: weakref.WeakSet = weakref.WeakSet()
        self.reservations: list[Reservation] = []
        self.last_reserved = float("-inf")  # When a reservation last ended, on `time.monotonic`'s clock.
        self.waiting: set[Reservation] = set()  # Of calls that wait; new packed rows let them go first.
        self.page_reads = 0
        self.gathers: Counter[str] = Counter()
        self.prefix_counts = PrefixCounts()
        _all.add(self)

    @property
    def num_waiting(self) -> int:
        """Calls that wait for a reservation."""
        return len(self.waiting)

    def group(self, group_key: KVCacheSpec, key: torch.Tensor, value: torch.Tensor, num_layers: int) -> KVCacheGroup:
        """The group of that key; sized at its first use from one layer's states and the model's layer count."""
        if group_key not in self.groups:
            kv_format = make_kv_format(group_key.states_dtype)
            bytes_per_block = kv_format.block_bytes(block_shape(key, value, self.config.block_size)) * num_layers
            self.groups[group_key] = KVCacheGroup(group_key, self.config, kv_format, bytes_per_block)
        return self.groups[group_key]

    def check_integrity(self) -> None:
        """Check ``free + cached + used == total`` and that the live block tables own what is used."""
        with self.lock:
            for key, group in self.groups.items():
                group.blocks.check_integrity(table.blocks for cache in self.caches for table in cache.tables_in(key))


_all: "weakref.WeakSet[KVPool]" = weakref.WeakSet()


def _reset_in_child() -> None:
    """In a forked child the calls of other threads are gone, and so is a thread that held a lock."""
    for pool in list(_all):
        pool.lock = threading.RLock()
        for reservation in {*pool.reservations, *pool.waiting}:
            if not reservation.is_of_this_thread:
                reservation.end(pool)
        for engine in list(pool.engines):
            engine.forget_other_threads()


after_fork_in_child(_reset_in_child)
