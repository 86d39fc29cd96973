"""The content of the pool at every step of a ``generate``."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel

import hf_paged
from hf_paged.models import registry


@dataclass
class Steps:
    """One entry per step.

    Attributes
    ----------
    used : list of int
        Blocks in use.
    alone : list of int
        Blocks that the same rows would take if no two shared one.
    waste : list of float
        Share of the used slots that hold no token.
    """

    used: list[int] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    waste: list[float] = field(default_factory=list)

    @property
    def saving(self) -> float:
        """Blocks saved by sharing over blocks without sharing, over all steps: as the paper defines it."""
        return 1 - sum(self.used) / sum(self.alone)


def blocks_without_sharing(model: PreTrainedModel) -> int:
    """Blocks that the live block tables would take if every entry were a block of its own."""
    return sum(
        len(table.blocks)
        for pool in registry.pools_under(model)
        for cache in pool.caches
        for key in pool.groups
        for table in cache.tables_in(key)
    )


def observed(model: PreTrainedModel, run: Callable[[], object]) -> Steps:
    """Look at `model`'s pool after every forward while `run` runs."""
    steps = Steps()

    def note(*_) -> None:
        stats = hf_paged.stats(model)
        if stats.used_blocks:
            steps.used.append(stats.used_blocks)
            steps.alone.append(blocks_without_sharing(model))
            steps.waste.append(stats.waste)

    hook = model.register_forward_hook(note)
    try:
        run()
    finally:
        hook.remove()
    return steps
