"""Plan: the blocks and bytes that a batch will need, and what would make them fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from hf_paged.cli.plan.footprint import Footprint, GroupFootprint, LayerStates
from hf_paged.memory.kv_format import BlockShape, make_kv_format
from hf_paged.memory.sizing import (
    HOST_SHARE,
    PROCESS_BYTES,
    StepLimits,
    Workspace,
    blocks_beside_steps,
    row_blocks,
    step_limits,
)

BLOCK_SIZES = (16, 32, 64, 128)
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The KV cache of `batch` rows of `context` tokens each, in blocks and in bytes.

    Rows share nothing and are equally long: the worst that this batch and context can need.

    Parameters
    ----------
    footprint : Footprint
    batch : int
        Rows.
    context : int
        Tokens stored in each row, prompt and generated.
    block_size : int
        Tokens a block holds.
    dtype : torch.dtype
        Of weights, and of keys and values as the model computes them.
    token_budget : int or None
        As `PagedConfig` has it.
    is_taken_at_once : bool
        Whether blocks have the budget for themselves, as on a GPU; on the CPU they share it with the steps.
    prepacks : bool
        Whether the weights of linear layers are laid out a second time.
    kv_dtype, kv_dtype_window : str or None
        How keys and values lie in pages, as in `PagedConfig`.
    """

    footprint: Footprint
    batch: int
    context: int
    block_size: int
    dtype: torch.dtype
    token_budget: int | None = None
    is_taken_at_once: bool = False
    prepacks: bool = False
    kv_dtype: str | None = None
    kv_dtype_window: str | None = None

    def row_blocks(self, group: GroupFootprint) -> int:
        """The most blocks a row owns while it grows to `context` tokens, one at a time."""
        return row_blocks(self.context, self.block_size, group.window)

    def blocks(self, group: GroupFootprint) -> int:
        return self.batch * self.row_blocks(group)

    def block_bytes(self, group: GroupFootprint) -> int:
        """Bytes of one block in all layers of the group."""
        return sum(self._layer_block_bytes(group, layer) for layer in group.layers)

    @property
    def kv_bytes(self) -> int:
        return sum(self.blocks(group) * self.block_bytes(group) for group in self.footprint.groups)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same rows in transformers' own dense cache, which keeps ``window - 1`` tokens."""
        per_row = 0
        for group in self.footprint.groups:
            kept = self.context if group.window is None else min(self.context, group.window - 1)
            per_row += kept * group.elements
        return self.batch * per_row * self.dtype.itemsize

    def empty_bytes(self, slots_a_row: float) -> float:
        """Bytes of the slots that hold no token if each row leaves `slots_a_row` of its last block empty."""
        slot_bytes = sum(map(self.block_bytes, self.footprint.groups)) / self.block_size
        return self.batch * slots_a_row * slot_bytes

    @property
    def weight_bytes(self) -> int:
        return self.footprint.num_parameters * self.dtype.itemsize

    @property
    def workspace(self) -> Workspace:
        """The memory of a step, in the plan's dtype."""
        known, ratio = self.footprint.workspace, Fraction(self.dtype.itemsize, self.footprint.dtype.itemsize)
        return replace(
            known,
            **{name: int(getattr(known, name) * ratio) for name in ("token_bytes", "row_bytes", "fixed_bytes")},
        )

    def limits(self, budget: int) -> StepLimits:
        """The limits of a step on the CPU."""
        return step_limits(self.token_budget, budget, self.workspace)

    def run_bytes(self, budget: int) -> int:
        """Bytes that a greedy run takes on the CPU at its peak, above the loaded model."""
        limits, workspace = self.limits(budget), self.workspace
        tokens, rows = min(limits.tokens, self.batch * self.context), min(limits.rows, self.batch)
        steps = workspace.of_tokens(tokens) + rows * workspace.row_bytes
        copies = self.footprint.num_linear_parameters * self.dtype.itemsize if self.prepacks else 0
        return PROCESS_BYTES + copies + steps + self.resident_kv_bytes(budget)

    def resident_kv_bytes(self, budget: int) -> int:
        """Bytes of blocks in a pool of `budget` bytes when it is fullest, and has not grown."""
        return sum(
            min(self.blocks(group), self._budget_blocks(group, budget)) * self.block_bytes(group)
            for group in self.footprint.groups
        )

    @property
    def budget_needed(self) -> int:
        """The smallest memory_budget whose blocks suffice in every group.

        The pool divides its budget by layers before it knows the contexts, so a group of many windowed
        layers holds a share it does not need, and this may be more than `kv_bytes`.
        """
        least = max(self.blocks(group) * self._share_unit(group) for group in self.footprint.groups)
        if self.fits(least):
            return least
        most = 2 * least
        while not self.fits(most):
            most *= 2
        return most - _largest(most - least, lambda saved: self.fits(most - saved))

    def fits(self, budget: int) -> bool:
        """Tell whether a pool of `budget` bytes holds the batch without growing."""
        return all(self.blocks(group) <= self._budget_blocks(group, budget) for group in self.footprint.groups)

    def _share_unit(self, group: GroupFootprint) -> int:
        """Bytes of budget for which the pool gives this group one block: as if all paged layers were like its first."""
        return self._layer_block_bytes(group, group.layers[0]) * self.footprint.num_paged_layers

    def _layer_block_bytes(self, group: GroupFootprint, layer: LayerStates) -> int:
        shape = BlockShape(layer.num_kv_heads, self.block_size, layer.key_dim, layer.value_dim)
        return make_kv_format(self.dtype, group.window, self).block_bytes(shape)

    def _budget_blocks(self, group: GroupFootprint, budget: int) -> int:
        if self.is_taken_at_once:
            return max(1, budget // self._share_unit(group))
        return blocks_beside_steps(budget, self._share_unit(group), self.workspace, self.limits(budget))


@dataclass(frozen=True)
class Memory:
    """The memory that this machine has for the blocks.

    Attributes
    ----------
    available : int
        Bytes available now.
    physical : int
        Bytes there are at all.
    stated : int or None
        The memory_budget that was asked for, in bytes; None: the default share of what is available.
    share : float
        The default share.
    is_taken_at_once : bool
        Whether the pool takes its budget when it is made, as on a GPU, and cannot exceed it.
    """

    available: int
    physical: int
    stated: int | None
    share: float = HOST_SHARE
    is_taken_at_once: bool = False

    def left(self, plan: Plan) -> int:
        """Bytes left once the weights are loaded."""
        return max(0, self.available - plan.weight_bytes)

    def budget(self, plan: Plan) -> int:
        """The budget of a pool that is made when the first token arrives, after the weights."""
        return self.stated if self.stated is not None else int(self.left(plan) * self.share)

    def holds_budget(self, plan: Plan) -> bool:
        """Tell whether a pool that takes its budget at once can be made."""
        return not self.is_taken_at_once or self.budget(plan) <= self.left(plan)

    def can_grow(self, plan: Plan) -> bool:
        """Tell whether a pool too small for the plan grows to it: its storage reserves what the machine has."""
        most = self.budget(plan) if self.is_taken_at_once else max(self.budget(plan), self.physical)
        return plan.fits(most) and plan.kv_bytes <= self.left(plan)

    def fits(self, plan: Plan) -> bool:
        """Tell whether the pool holds the plan without growing, and the machine holds the pool."""
        return plan.fits(self.budget(plan)) and plan.kv_bytes <= self.left(plan) and self.holds_budget(plan)


@dataclass(frozen=True)
class Remedy:
    """One change that may make a plan fit, alone.

    Attributes
    ----------
    change : str
        What to set, as an argument reads.
    plan : Plan
        The plan with that change.
    fits : bool
        Whether it fits then.
    """

    change: str
    plan: Plan
    fits: bool


def remedies(plan: Plan, memory: Memory) -> list[Remedy]:
    """Changes that may make a plan fit that does not: cheapest for the user first."""
    found = []
    if plan.dtype.itemsize > 2:
        found.append(_tried("dtype=torch.bfloat16", replace(plan, dtype=torch.bfloat16), memory.fits))
    if plan.kv_dtype is None:
        quantised = replace(plan, kv_dtype="int8")
        if quantised.budget_needed < plan.budget_needed:
            found.append(_tried('kv_dtype="int8"', quantised, memory.fits))
    sizes = [size for size in (8, *BLOCK_SIZES) if size < plan.block_size]
    if sizes:
        smaller = min((replace(plan, block_size=size) for size in sizes), key=lambda each: each.budget_needed)
        if smaller.budget_needed < plan.budget_needed:
            found.append(_tried(f"block_size={smaller.block_size}", smaller, memory.fits))
    mebibytes = -(-plan.budget_needed // MIB)
    found.append(_tried(f'memory_budget="{mebibytes}MiB"', plan, replace(memory, stated=mebibytes * MIB).fits))
    rows = _largest(plan.batch, lambda batch: memory.fits(replace(plan, batch=batch)))
    if rows:
        found.append(_tried(f"a batch of at most {rows:,}", replace(plan, batch=rows), memory.fits))
    tokens = _largest(plan.context, lambda context: memory.fits(replace(plan, context=context)))
    if tokens:
        found.append(_tried(f"a context of at most {tokens:,}", replace(plan, context=tokens), memory.fits))
    return found


def _tried(change: str, plan: Plan, fits: Callable[[Plan], bool]) -> Remedy:
    return Remedy(change, plan, fits(plan))


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `limit` that fits, 0 if none does. More never fits where less does not."""
    fitting, too_large = 0, limit
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(middle):
            fitting = middle
        else:
            too_large = middle
    return fitting
