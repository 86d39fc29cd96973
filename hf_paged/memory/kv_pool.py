"""KVPool: all the KV memory of one model, and the KV cache groups it is divided into."""

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import torch
from transformers.utils import logging

from hf_paged.atomic import after_fork_in_child, when_idle
from hf_paged.compat import devices
from hf_paged.config import PagedConfig
from hf_paged.errors import OutOfBlocksError
from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.eviction import EVICTION_POLICIES
from hf_paged.memory.kv_format import BlockShape, KVFormat, make_kv_format
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.memory.reservation import Reservation
from hf_paged.memory.sizing import (
    WHOLE,
    StepLimits,
    Workspace,
    available_memory,
    blocks_beside_steps,
    budget_bytes,
    is_taken_at_once,
    missing_beside_steps,
    physical_memory,
)

logger = logging.get_logger(__name__)

# Until cached blocks beyond prefix_cache_share are given up in a pool without calls: a conversation may go on.
_CACHED_SECONDS = 60.0


@dataclass(frozen=True)
class KVCacheSpec:
    """The properties that layers must share to share block tables.

    Attributes
    ----------
    window : int or None
        Sliding window in tokens; None: full attention.
    states_dtype : torch.dtype
        Of keys and values as the model computes them. What their pages are is for the KV format to say.
    device : torch.device
        Of the states, and of the pages.
    """

    window: int | None
    states_dtype: torch.dtype
    device: torch.device


class KVCacheGroup:
    """The blocks of the layers of one spec: ids in a `BlockPool`, and the storage of each layer.

    A block id names one block in each layer of the group.

    Parameters
    ----------
    spec : KVCacheSpec
    config : PagedConfig
    kv_format : KVFormat
        Of the pages of all layers.
    budget : int
        Bytes that the pool may take on the device.
    bytes_per_block : int
        Of these, the bytes that buy one block.

    Attributes
    ----------
    budget_blocks : int
        Blocks that the budget holds.
    capacity : int
        Blocks that can be made addressable. On the CPU those that the machine could hold: a call that cannot wait may
        exceed the budget rather than fail. Elsewhere those of the budget, which are allocated at once.
    blocks : BlockPool
    layers : dict of int to KVStorage
        By cache layer.
    """

    def __init__(self, spec: KVCacheSpec, config: PagedConfig, kv_format: KVFormat, budget: int, bytes_per_block: int):
        self.spec, self.config, self.kv_format = spec, config, kv_format
        self.budget, self.bytes_per_block = budget, bytes_per_block
        self.budget_blocks = self.capacity = max(1, budget // bytes_per_block)
        if not is_taken_at_once(spec.device):
            self.capacity = max(self.budget_blocks, physical_memory(spec.device) // bytes_per_block)
        policy = EVICTION_POLICIES[config.eviction_policy]()
        self.blocks = BlockPool(self.budget_blocks, config.block_size, self._cache_blocks, policy)
        self.layers: dict[int, KVStorage] = {}

    @property
    def window(self) -> int | None:
        """Sliding window in tokens; None: full attention."""
        return self.spec.window

    @property
    def kind(self) -> str:
        """The property that its layers share, as users read it."""
        return "full attention" if self.window is None else f"window of {self.window:,}"

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the pages of all layers that have some."""
        pages = (page for storage in self.layers.values() for page in storage.pages)
        return sum(page[0].nbytes for page in pages) // self.blocks.block_size

    @property
    def _cache_blocks(self) -> int:
        return int(self.budget_blocks * self.config.prefix_cache_share)

    def make_room(self, workspace: Workspace, limits: StepLimits) -> None:
        """Take blocks away, in an atomic section, so that the budget holds steps up to `limits` as well.

        On the CPU alone: elsewhere the blocks are the budget. Blocks that were handed out before stay.
        """
        if is_taken_at_once(self.spec.device):
            return
        if missing := missing_beside_steps(self.budget, workspace, limits):
            logger.warning_once(
                f"hf_paged: memory_budget is {self.budget:,} bytes, and steps of {limits.tokens} tokens take so much "
                f"beside the blocks that the process may take {missing:,} bytes more. Raise memory_budget, or set a "
                "smaller token_budget."
            )
        self.budget_blocks = blocks_beside_steps(self.budget, self.bytes_per_block, workspace, limits)
        self.blocks.shrink(self.blocks.total_blocks - self.budget_blocks)
        self.blocks.cache_blocks = self._cache_blocks

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVStorage:
        """Storage of layer `index`, made for states ``[batch, num_kv_heads, positions, head_dim]`` if new.

        Raises
        ------
        OutOfBlocksError
            If the device has no memory for it.
        """
        if index not in self.layers:
            shape = block_shape(key, value, self.blocks.block_size)
            try:
                self.layers[index] = KVStorage(self.kv_format, shape, self.spec.device, self.capacity)
            except torch.OutOfMemoryError as error:
                raise self._no_memory(self.kv_format.block_bytes(shape)) from error
        return self.layers[index]

    def _no_memory(self, block_bytes: int) -> OutOfBlocksError:
        """The error of a layer whose blocks, of so many bytes each, find no memory."""
        wanted, free = self.capacity * block_bytes, available_memory(self.spec.device)
        return OutOfBlocksError(
            self.capacity,
            min(self.capacity, free // block_bytes),
            0,
            f"the pool cannot be allocated: {len(self.layers)} layers of a KV cache group have their {self.capacity} "
            f"blocks on {self.spec.device}, the next one needs {wanted:,} bytes, and {free:,} are free. "
            "Set a smaller memory_budget with hf_paged.configure, which also gives back what the layers have",
        )

    def allocate_or_grow(self, num_blocks: int, reservations: Sequence[Reservation] = ()) -> list[int]:
        """As `BlockPool.allocate`; where the budget does not hold them the pool grows, with one warning.

        Only on the CPU: elsewhere the addresses of a larger pool would be others, and what is free is the user's.

        Parameters
        ----------
        num_blocks : int
        reservations : sequence of Reservation
            The caller's: the blocks are taken from what these promise, as far as it goes.

        Raises
        ------
        OutOfBlocksError
            If more than `capacity` are needed.
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

    def give_back(self) -> None:
        """Give memory above the low-water mark back to the system: `cache_blocks` of the pool, cached ones and free.

        On the CPU alone: elsewhere the pages are one allocation. Under the pool's lock.
        """
        if is_taken_at_once(self.spec.device):
            return
        vacated = self.blocks.vacate(max(0, self.blocks.cache_blocks - self.blocks.cached_blocks))
        for storage in self.layers.values():
            storage.vacate(vacated)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks in every layer: the copy of copy-on-write. Under the pool's lock."""
        if not copies:
            return
        source, destination = devices.upload(list(zip(*copies)), self.spec.device).unbind()
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


@dataclass
class SwapCounts:
    """Blocks of a pool that were moved to its swap space and back so far.

    Attributes
    ----------
    spilled, restored : int
        Each block of a KV cache group counts.
    """

    spilled: int = 0
    restored: int = 0


@dataclass
class CaptureCounts:
    """How the packed steps of a pool ran so far whose engine captures decode steps.

    Attributes
    ----------
    replays : int
        Steps that replayed a captured one.
    eager_steps, dropped : Counter of str
        Steps that ran eagerly, and captured steps that were dropped, by reason.
    """

    replays: int = 0
    eager_steps: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: "CaptureCounts") -> None:
        """Count what `other` counts as well."""
        self.replays += other.replays
        self.eager_steps.update(other.eager_steps)
        self.dropped.update(other.dropped)


def block_shape(key: torch.Tensor, value: torch.Tensor, block_size: int) -> BlockShape:
    """The shape of the blocks of a layer with states ``[batch, num_kv_heads, positions, head_dim]``."""
    return BlockShape(key.shape[1], block_size, key.shape[3], value.shape[3])


class BlockOwner(Protocol):
    """A live cache, or an engine: it owns blocks through tables."""

    def tables_in(self, spec: KVCacheSpec) -> list[BlockTable]:
        """Every table through which it owns blocks of one KV cache group."""


class PackedEngine(Protocol):
    """An engine, as the calls that wait for its blocks see it."""

    @property
    def token_budget(self) -> int:
        """Tokens that one of its steps runs at most."""

    @property
    def is_running(self) -> bool:
        """Tell whether rows of calls are under way, which hold blocks."""

    @property
    def num_preemptions(self) -> int:
        """Times that a row gave its blocks up to rows that came earlier."""

    @property
    def captured_buckets(self) -> tuple[int, ...]:
        """Sizes in rows of the decode steps that are captured now."""

    @property
    def swapped_bytes(self) -> int:
        """Bytes of the blocks that the engine has in its swap space."""

    def forget_other_threads(self) -> None:
        """Drop the calls of all threads but this one: in a forked child they are gone."""


class KVPool:
    """The blocks of one model (of its decoder), shared by every cache of that model.

    Owns the storage; caches own the blocks they use and give them back when they die. What changes the pool's
    state is an atomic section (`atomic.py`) and holds `lock`, which readers hold, too. The storage of a layer is made
    when its first states come.

    Parameters
    ----------
    config : PagedConfig

    Attributes
    ----------
    groups : dict of KVCacheSpec to KVCacheGroup
        In the order in which the model first stored states of each spec.
    caches : weak set of BlockOwner
        Live caches and engines.
    engines : weak set of PackedEngine
    reservations : list of Reservation
        Promised, and not ended.
    waiting : set of Reservation
        Of calls that wait for their promise; new packed rows let them go first.
    last_reserved : float
        When a reservation last ended, on `time.monotonic`'s clock.
    page_reads : int
        Attention calls that read pages.
    gathers : Counter of str
        Copies out of the pages, by reason.
    prefix_counts : PrefixCounts
    swap_counts : SwapCounts
    capture_counts : CaptureCounts
    """

    def __init__(self, config: PagedConfig):
        self.config = config
        self.lock = threading.RLock()
        self.groups: dict[KVCacheSpec, KVCacheGroup] = {}
        self._budgets: dict[torch.device, int] = {}
        self.caches: weakref.WeakSet[BlockOwner] = weakref.WeakSet()
        self.engines: weakref.WeakSet[PackedEngine] = weakref.WeakSet()
        self.reservations: list[Reservation] = []
        self.last_reserved = float("-inf")
        self.waiting: set[Reservation] = set()
        self.page_reads = 0
        self.gathers: Counter[str] = Counter()
        self.prefix_counts = PrefixCounts()
        self.swap_counts = SwapCounts()
        self.capture_counts = CaptureCounts()
        _all.add(self)

    @property
    def num_waiting(self) -> int:
        """Calls that wait for a reservation."""
        return len(self.waiting)

    def group(
        self, spec: KVCacheSpec, key: torch.Tensor, value: torch.Tensor, num_layers: int, share: Fraction = WHOLE
    ) -> KVCacheGroup:
        """The KV cache group of a spec, made if new: sized as if all layers of the model were like the one given.

        Parameters
        ----------
        spec : KVCacheSpec
        key, value : torch.Tensor
            States of one layer, ``[batch, num_kv_heads, positions, head_dim]``.
        num_layers : int
            Layers that the model pages, in all groups: they divide the budget.
        share : Fraction
            Of these, the part on the spec's device.

        Raises
        ------
        UnsupportedError
            If the KV format does not store such states.
        OutOfBlocksError
            If the device has no memory for the budget.
        """
        if spec not in self.groups:
            kv_format = make_kv_format(spec.states_dtype, spec.window, self.config)
            layers_here = max(1, round(num_layers * share))
            bytes_per_block = kv_format.block_bytes(block_shape(key, value, self.config.block_size)) * layers_here
            budget = self._budget(spec.device, share, bytes_per_block)
            self.groups[spec] = KVCacheGroup(spec, self.config, kv_format, budget, bytes_per_block)
        return self.groups[spec]

    def _budget(self, device: torch.device, share: Fraction, bytes_per_block: int) -> int:
        """Bytes that the pool may take on a device. Asked once: later groups find less free, earlier ones have it."""
        if device not in self._budgets:
            budget = budget_bytes(self.config, device, share)
            if is_taken_at_once(device) and budget > (free := available_memory(device)):
                raise OutOfBlocksError(
                    budget // bytes_per_block,
                    free // bytes_per_block,
                    0,
                    f"the pool cannot be allocated: memory_budget is {budget:,} bytes, all of which are allocated at "
                    f"once, and {free:,} are free on {device}. Set a smaller memory_budget with hf_paged.configure, "
                    "leave it out for the default, or free memory on the device",
                )
            self._budgets[device] = budget
        return self._budgets[device]

    def give_back(self, idle_seconds: float) -> bool:
        """Give memory back that no call needs now, in an atomic section. Nothing happens while calls run.

        Parameters
        ----------
        idle_seconds : float
            How long no call has run. After `_CACHED_SECONDS` cached blocks beyond the share of the prefix cache are
            given up as well.

        Returns
        -------
        bool
            True: call again later. There will be more to give back when that time is over, or another thread has
            the pool now.
        """
        if not self.lock.acquire(blocking=False):  # All sections would wait.
            return True
        try:
            if self.reservations or self.waiting or any(engine.is_running for engine in self.engines):
                return False
            for group in self.groups.values():
                if idle_seconds >= _CACHED_SECONDS:
                    group.blocks.evict_down_to(group.blocks.cache_blocks)
                group.give_back()
            return any(group.blocks.cached_blocks > group.blocks.cache_blocks for group in self.groups.values())
        finally:
            self.lock.release()

    def check_integrity(self) -> None:
        """Check ``free + cached + used == total`` and that the live block tables own what is used.

        Raises
        ------
        AssertionError
            With the broken invariant.
        """
        with self.lock:
            for spec, group in self.groups.items():
                group.blocks.check_integrity(table.blocks for owner in self.caches for table in owner.tables_in(spec))


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


def _give_back(idle_seconds: float) -> bool:
    return any([pool.give_back(idle_seconds) for pool in list(_all)])


after_fork_in_child(_reset_in_child)
when_idle(_give_back)
