"""Lazy tensors: KV states and masks that stay pages until an operation wants them dense.

`PagedStates` is what a paged layer returns from `update`, `PagedMask` what the mask function returns.
Both report the dense shape and own no storage. The paged attention function takes the pages from them;
any other operation that touches them gets the dense tensor, so a model that does something else with its
keys, values or masks is still right.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_paged.cache.append_step import AppendStep
from hf_paged.cache.batch_state import BatchState, GroupRows
from hf_paged.cache.edits import same_bits
from hf_paged.compat.torch import TO_COPY, make_wrapper_subclass, tree_map_only, writes_to_input
from hf_paged.models import forward_context
from hf_paged.reasons import Reason, Why, count_and_log

if TYPE_CHECKING:
    from hf_paged.cache.layers import PagedLayer


class LazyTensor(torch.Tensor):
    """A tensor without storage that becomes dense when an operation touches it."""

    keeps_changes = False  # True: the cache holds what `dense` returns from then on.

    def dense(self, reason: Why) -> torch.Tensor:
        """The dense tensor; `reason` says why it is wanted."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # The stub lacks `func`.
        if writes_to_input(func) and args and isinstance(args[0], LazyTensor) and not args[0].keeps_changes:
            raise RuntimeError(
                f"{func} would change a paged tensor in place, and the change would be lost: "
                "clone it first, or use another attn_implementation"
            )
        reason = Reason.APPLIED_OPERATION.of(str(func.overloadpacket))
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy.dense(reason), (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class PageView:
    """The pages of one layer as one `update` left them.

    Attributes
    ----------
    batch : BatchState
    rows : GroupRows
        Of the layer's KV cache group.
    step : AppendStep
        The update.
    layer : int
        Index of the layer.
    version : int
        Of `rows`, after the update.
    owner : PagedLayer
        The layer that was updated.
    """

    batch: BatchState
    rows: GroupRows
    step: AppendStep
    layer: int
    version: int
    owner: "PagedLayer"

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
        The states this update appended, ``[batch, num_kv_heads, new positions, head_dim]``; where nothing came before
        them, as the pages hold them.
    is_key : bool
        Keys, not values.
    dense_states : torch.Tensor or None
        The dense tensor, once an operation wanted it.
    """

    pages: PageView
    fresh: torch.Tensor
    is_key: bool
    dense_states: torch.Tensor | None

    @staticmethod
    def __new__(cls, view: PageView, fresh: torch.Tensor, is_key: bool, visible: int) -> "PagedStates":
        batch, heads, _, dim = fresh.shape
        self = make_wrapper_subclass(cls, (batch, heads, visible, dim), dtype=fresh.dtype, device=fresh.device)
        self.pages, self.fresh, self.is_key = view, fresh, is_key
        self.dense_states = None
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"PagedStates(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.pages.layer})"

    def dense(self, reason: Why) -> torch.Tensor:
        if self.dense_states is None:
            self.dense_states = self._copy(reason)
        elif self.pages.step.start > 0:
            self.pages.check()
        return self.dense_states

    def _copy(self, reason: Why) -> torch.Tensor:
        if self.pages.step.start == 0:  # Nothing came before: the fresh states are all there is.
            return self.fresh.clone(memory_format=torch.contiguous_format)
        self.pages.check()
        batch, step = self.pages.batch, self.pages.step
        why = Reason.EXPANDED_LATENTS if self._is_latent() else reason
        count_and_log(batch.pool.gathers, why, "keys or values are gathered")
        return batch.gather(self.pages.layer, self.is_key, step.end - self.shape[2], step.end)

    def _is_latent(self) -> bool:
        """Tell whether these are latents, or their rope parts, by what the model's config says of itself."""
        forward = forward_context.running_forward()
        if forward is None or self.shape[1] != 1:
            return False
        rank = getattr(forward.model.config.get_text_config(decoder=True), "kv_lora_rank", None)
        return self.pages.rows.group.layers[self.pages.layer].head_dim(is_key=True) == rank

    def take_edits(self) -> bool:
        """Tell whether the model wrote into parts of the dense tensor (``keys[:, :, 0] = 0``); the cache follows."""
        if self.dense_states is None or same_bits(self.dense_states, self._copy(Reason.CACHE_EDITED)):
            return False
        self.pages.owner.note_edit(self.is_key, self.dense_states)
        return True


@dataclass(frozen=True)
class MaskPattern:
    """A causal mask in words: a query sees the last `window` tokens, itself included; None: all of them."""

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

    pattern: MaskPattern | None
    obstacle: Why | None
    offset: int
    visible_lens: list[int] | None
    _make_mask: Callable[[bool], torch.Tensor | None]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        make_mask: Callable[[bool], torch.Tensor | None],
        pattern: MaskPattern | None,
        obstacle: Why | None,
        offset: int,
        visible_lens: list[int] | None = None,
    ) -> "PagedMask":
        """Describe a mask.

        Parameters
        ----------
        make_mask : callable
            Takes whether the mask may be left out where ``is_causal`` says it all. Returns the mask, or None then.
            Called at most once for each answer.
        """
        self = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._make_mask = functools.cache(make_mask)
        self.pattern, self.obstacle, self.offset, self.visible_lens = pattern, obstacle, offset, visible_lens
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"PagedMask(shape={tuple(self.shape)}, pattern={self.pattern})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # The stub lacks `func`.
        kwargs = kwargs or {}
        if func is TO_COPY and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]._on(kwargs.get("device") or args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _on(self, device: torch.device) -> "PagedMask":
        """The same mask, lazy still, on another device: hooks of accelerate move masks to that of each layer."""

        def make_mask(may_skip: bool) -> torch.Tensor | None:
            mask = self._make_mask(may_skip)
            return None if mask is None else mask.to(device)

        parts = (self.pattern, self.obstacle, self.offset, self.visible_lens)
        return PagedMask(self.shape, self.dtype, device, make_mask, *parts)

    def for_sdpa(self) -> torch.Tensor | None:
        """The mask as sdpa takes it: None where ``is_causal`` says it all."""
        return self._make_mask(True)

    def dense(self, reason: Why) -> torch.Tensor:
        mask = self._make_mask(False)
        assert mask is not None, "only a mask that may be left out is None"
        return mask
