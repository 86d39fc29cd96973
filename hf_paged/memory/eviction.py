"""Eviction policies: which cached block is given up first. Adding one is a class and a line in `EVICTION_POLICIES`."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """The cached blocks of one `BlockPool`, and the order in which they are given up.

    A cached block has no owner; its content is kept because a later row may begin with the same tokens. The policy
    chooses among such blocks and nothing else: a block that is in use, or free, is never here.

    Only the pool calls a policy, under the lock of the pool's owner and inside an atomic section. A policy calls
    nothing back, raises nothing, and takes about constant time: every block of every row that ends passes through it.

    Whatever the order, results stay right: rows whose blocks are gone compute them again. What an order costs is
    computation. A block is found again only while all blocks before it in its row are there (within a sliding window,
    those that the window reaches), so a good order gives up what comes later in a row first.
    """

    def add(self, block: int) -> None:
        """Take in `block`: its last owner has freed it just now.

        Blocks that are freed together arrive in the order in which they should go: a row frees its last block first.
        """

    def remove(self, block: int) -> None:
        """Let go of `block`, which is here: a row takes it into use again, or its content is void."""

    def pop(self) -> int:
        """Choose the block to give up, let go of it and return it. Called only while a block is here."""

    def __contains__(self, block: int) -> bool:
        """Tell whether `block` is here."""

    def __len__(self) -> int:
        """Blocks that are here."""

    def __iter__(self) -> Iterator[int]:
        """Every block that is here once, in any order (for checks)."""


class LeastRecentlyUsed:
    """Gives up the block that was freed longest ago."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, block: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def pop(self) -> int:
        return self._blocks.popitem(last=False)[0]

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)


# What `PagedConfig(eviction_policy=...)` may name. Called once for each KV cache group.
EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LeastRecentlyUsed}
