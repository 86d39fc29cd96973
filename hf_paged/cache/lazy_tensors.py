"""Lazy tensors: KV states and masks that stay pages until an operation wants them dense.

`PagedStates` is what a paged layer returns from `update`, `PagedMask` what the mask function returns.
Both report the dense shape and own no storage. The paged attention function takes the pages from them;
any other operation that touches them gets the dense tensor, so a model that does something else with its
keys, values or masks is still right.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from hf_paged.cache.append_step import AppendStep
from hf_paged.cache.batch_state import BatchState, GroupRows
from hf_paged.reasons import Reason, Why, count


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bytes: NaN equals itself, and -0.0 is not 0.0."""
    return torch.equal(*(states.detach().contiguous().view(torch.uint8) for states in (one, other)))


class LazyTensor(torch.Tensor):
    """A tensor without storage that becomes dense when an operation touches it."""

    keeps_changes = False  # Whether what `dense` returns is what the cache holds from then on.

    def dense(self, reason: Why) -> torch.Tensor:
        """The dense tensor; `reason` says who wants it."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and args and isinstance(args[0], LazyTensor) and not args[0].keeps_changes:
            raise RuntimeError(
                f"{func} would change a paged tensor in place, and the change would be lost: "
                "clone it first, or use another attn_implementation"
            )
        reason = Reason.APPLIED_OPERATION.of(str(func.overloadpacket))
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy.dense(reason), (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class PageView:
    """The pages of one layer as one `update` left them."""

    batch: BatchState
    rows: GroupRows
    step: AppendStep
    layer: int
    version: int
    owner: Any  # The PagedLayer that was updated.

    def check(self) -> None:
        """Refuse to be read after the cache has changed."""
        if self.version != self.rows.version:
            raise RuntimeError(
                "keys or values that a paged cache returned earlier are read after the cache has changed: "
                "clone them before the next update, crop or reordering"
            )


class PagedStates(LazyTensor):
    """Keys or values ``[batch, num_kv_heads, positions, head_dim]`` that lie in pages.

    Holds its `BatchState` (and so their blocks) alive; own it for one forward only.

    Attributes
    ----------
    pages : PageView
        Shared by the keys and the values of one update.
    fresh : torch.Tensor
        The states this update appended.
    made : torch.Tensor or None
        The dense tensor, once an operation wanted it.
    """

    pages: PageView
    fresh: torch.Tensor
    is_key: bool
    made: torch.Tensor | None

    @staticmethod
    def __new__(cls, view: PageView, fresh: torch.Tensor, is_key: bool, visible: int) -> "PagedStates":
        batch, heads, _, dim = fresh.shape
        self = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, visible, dim), dtype=fresh.dtype, device=fresh.device
        )
        self.pages, self.fresh, self.is_key = view, fresh, is_key
        self.made = None
        return self

    def __repr__(self):
        return f"PagedStates(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.pages.layer})"

    def dense(self, reason: Why) -> torch.Tensor:
        if self.made is None:
            self.made = self._make(reason)
        elif self.pages.step.start > 0:
            self.pages.check()
        return self.made

    def _make(self, reason: Why) -> torch.Tensor:
        if self.pages.step.start == 0:  # Nothing came before: the fresh states are all there is.
            return self.fresh.clone(memory_format=torch.contiguous_format)
        self.pages.check()
        batch, step = self.pages.batch, self.pages.step
        count(batch.pool.gathers, reason, "keys or values are gathered")
        return batch.gather(self.pages.layer, self.is_key, step.end - self.shape[2], step.end)

    def take_edits(self) -> bool:
        """Tell whether the model wrote into parts of the dense tensor (``keys[:, :, 0] = 0``); the cache follows."""
        if self.made is None or same_bits(self.made, self._make(Reason.CACHE_EDITED)):
            return False
        self.pages.owner.note_edit(0 if self.is_key else 1, self.made)
        return True


@dataclass(frozen=True)
class MaskPattern:
    """What a causal mask allows: the last `window` tokens, or all of them if None."""

    window: int | None


class PagedMask(LazyTensor):
    """The 4D mask ``[batch, 1, queries, positions]`` of a forward over a paged cache.

    Bool, True where a query sees a position, or additive for a model that knows no other masks.

    Attributes
    ----------
    pattern : MaskPattern or None
        None if the mask is more than causal, windowed and padded.
    obstacle : Reason or None
        Why the pages cannot serve it although the pattern is known.
    offset : int
        Position of the first column.
    visible_lens : list of int or None
        For each row the tokens from the front that all its queries see; None if that is not all there is to it.
    """

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[bool], torch.Tensor | None],
        pattern: MaskPattern | None,
        obstacle: Why | None,
        offset: int,
        visible_lens: list[int] | None = None,
    ) -> "PagedMask":
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._make, self.pattern, self.obstacle, self.offset = functools.cache(make), pattern, obstacle, offset
        self.visible_lens = visible_lens
        return self

    def __repr__(self):
        return f"PagedMask(shape={tuple(self.shape)}, pattern={self.pattern})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]._on(kwargs.get("device") or args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _on(self, device: torch.device) -> "PagedMask":
        """The same mask, lazy still, on another device: hooks of accelerate move masks to that of each layer."""

        def make(may_skip: bool) -> torch.Tensor | None:
            mask = self._make(may_skip)
            return None if mask is None else mask.to(device)

        parts = (self.pattern, self.obstacle, self.offset, self.visible_lens)
        return PagedMask(self.shape, self.dtype, device, make, *parts)

    def sdpa(self) -> torch.Tensor | None:
        """The mask as sdpa would have got it: None where `is_causal` says it all."""
        return self._make(True)

    def dense(self, reason: Why) -> torch.Tensor:
        return self._make(False)
