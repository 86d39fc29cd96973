"""What the pool holds at every step of a ``generate``."""

from dataclasses import dataclass, field

import hf_paged
from hf_paged_evals.sharing import blocks_without_sharing


@dataclass
class Steps:
    """One entry a step.

    Attributes
    ----------
    used : list of int
        Blocks in use.
    alone : list of int
        What they would be if no two rows shared one.
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


def observed(model, run) -> Steps:
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
