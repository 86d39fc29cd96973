"""The cache that a packed forward is given, and how its layers attend.

A layer's ``update`` returns the new states untouched. The attention function stores them and reads the pages with
one op, through the `PackedForward` that the model's call hands down to it as a keyword.

The mask function gets no keywords, and it must know a packed step as well. It does by the sizes that a layer reports
(`PACKED_OFFSET`), and the attention function knows a mask that it made by its sizes (`packed_mask`). Sizes are what
survives the way through a model: `torch.compile` traces them without a guard on this library's state, and they stay
where a model slices a mask or a hook moves it to another device. An attribute of a tensor is gone after the first
operation, compiled or not.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.execution.latent import Expansion, find_expansion
from hf_paged.execution.step_inputs import StepInputs
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.reasons import Reason, Why
from hf_paged_kernels import ops

# The keyword under which a `PackedForward` travels from the model's call to its attention function.
PACKED_FORWARD = "hf_paged_forward"
# The position of the first key, as a packed layer reports it to the mask function. In no other cache it is negative.
PACKED_OFFSET = -1


class NotPackableError(Exception):
    """The model does something between its cache and its attention that a packed step cannot follow.

    Attributes
    ----------
    why : Why
    """

    def __init__(self, why: Why):
        self.why = why
        super().__init__(why.text)


def packed_mask(window: int | None, device: torch.device) -> torch.Tensor:
    """Make the mask of a packed step. It has no content: rows and lengths are in the step's `AttentionMetadata`.

    Parameters
    ----------
    window : int or None
        The sliding window of the layers that the mask is for.

    Returns
    -------
    torch.Tensor
        ``[1, 1, 0, window]``, 0 for no window. No other mask is for no queries.
    """
    return torch.empty(1, 1, 0, window or 0, device=device)


def is_packed_mask(mask: torch.Tensor | None) -> bool:
    """Tell whether `packed_mask` made this."""
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 0


class PackedForward:
    """One forward of a model over a packed step, as its cache layers and its attention function see it.

    Counts in Python: code that was captured and is replayed changes nothing here.

    Parameters
    ----------
    inputs : StepInputs
    is_trial : bool
        True: check the numbers of latents that a layer expands.

    Attributes
    ----------
    fresh : dict of int to (key, value)
        New states by cache layer, from the layer's `update` until its attention takes them.
    page_reads : int
        Attention calls so far.
    """

    def __init__(self, inputs: StepInputs, is_trial: bool = False):
        self.inputs, self.is_trial = inputs, is_trial
        self.fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.page_reads = 0

    @property
    def has_attended(self) -> bool:
        """Tell whether every layer has stored its states and has read its pages, once."""
        return not self.fresh and self.page_reads == len(self.inputs.layers)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
        key: torch.Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
        value: torch.Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
        mask: torch.Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Store the new states of one layer and attend over its pages: those that the layer's `update` got.

        The layer may attend to them as they are. Or they are latents, and it attends to keys and values that it has
        expanded them into: then the expansion is absorbed, see `latent`.

        Parameters
        ----------
        module : torch.nn.Module
            The attention module; its ``layer_idx`` names the layer.
        mask : torch.Tensor
            As `packed_mask` made it.
        kwargs : dict
            Further arguments of the attention function: ``softcap``, ``s_aux`` or ``sinks``.

        Returns
        -------
        torch.Tensor
            ``[1, num_tokens, num_heads, value_dim]``

        Raises
        ------
        NotPackableError
            If these are neither the states that `update` got nor expanded latents, or the mask is not that of the
            layer's window.
        """
        index: Any = getattr(module, "layer_idx", None)
        fresh = self.fresh.pop(index, None)
        if fresh is None:
            raise NotPackableError(Reason.EARLY_COMPUTATION)
        expansion: Expansion | None = None
        if fresh[0] is not key or fresh[1] is not value:
            found = find_expansion(module, *fresh, key, value, self.is_trial)
            if not isinstance(found, Expansion):
                raise NotPackableError(found)
            expansion = found
        storage, metadata = self.inputs.layers[index]
        if key.dtype != storage.states_dtype or key.device != storage.device:
            raise NotPackableError(Reason.CHANGED_PLACE)
        # A compiled mask function cannot tell the window: the engine's first steps ran uncompiled, and were checked.
        if not is_packed_mask(mask) or not (torch.compiler.is_compiling() or _is_for(mask, metadata.window)):
            raise NotPackableError(Reason.OTHER_PATTERN)
        sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
        softcap = kwargs.get("softcap")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        self.page_reads += 1
        if expansion is not None:
            if sinks is not None or softcap is not None:
                raise NotPackableError(Reason.UNABSORBED.of("beside sinks or a softcap"))
            return _attend_latents(expansion, storage, metadata, query, key, value, *fresh, scale)[None]
        out = storage.write_and_attend(
            query[0].transpose(0, 1),  # [num_tokens, num_heads, key_dim]
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            metadata.slot_mapping,
            metadata.block_tables,
            metadata.context_lens,
            metadata.cu_seqlens_q,
            scale,
            metadata.window,
            softcap,
            sinks,
        )
        return out[None]


def _attend_latents(
    expansion: Expansion,
    storage: KVStorage,
    metadata: AttentionMetadata,
    query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
    key: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
    value: torch.Tensor,  # [1, num_heads, num_tokens, value_dim]
    latent: torch.Tensor,  # [1, 1, num_tokens, rank]
    rope: torch.Tensor,  # [1, 1, num_tokens, rope_dim]
    scale: float,
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    """Store the latents of a step and attend: over those in the pages, or over the expanded ones of a row's beginning.

    Absorbed attention multiplies with heads as large as a latent, which takes several times the work. That is less than
    expanding what is stored, and more than attention over what the layer has expanded anyhow.
    """
    storage.write(latent[0].transpose(0, 1), rope[0].transpose(0, 1), metadata.slot_mapping)
    rows = (metadata.block_tables, metadata.context_lens, metadata.cu_seqlens_q)
    # A compiled step would be compiled again for each place of the first new row. And where pages round what they
    # store, rows see what is stored, however their prompts are cut into steps.
    if torch.compiler.is_compiling() or metadata.new_rows is None or not storage.kv_format.is_lossless:
        return _attend_absorbed(expansion, storage, rows, query, scale, metadata.window)
    first_row, first_token, _ = metadata.new_rows
    states, key, value = (x[0, :, first_token:].transpose(0, 1) for x in (query, key, value))
    pages = (key.contiguous()[:, :, None], value.contiguous()[:, :, None])  # [num_new_tokens, num_heads, 1, head_dim]
    new = ops.paged_attention(states, *pages, *metadata.rows_in_step, scale, metadata.window)
    if first_row == 0:
        return new
    tables, context_lens, cu_seqlens_q = rows
    rows = (tables[:first_row], context_lens[:first_row], cu_seqlens_q[: first_row + 1])
    old = _attend_absorbed(expansion, storage, rows, query[:, :, :first_token], scale, metadata.window)
    return torch.cat((old, new))


def _attend_absorbed(
    expansion: Expansion,
    storage: KVStorage,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
    """Attend over latents in pages; `rows` are block tables, context lengths and starts."""
    return expansion.values_of(storage.attend_latents(*expansion.absorb(query[0]), *rows, scale, window))


def _is_for(mask: torch.Tensor | None, window: int | None) -> bool:
    """Tell whether a packed mask is for layers of that window."""
    return mask is not None and mask.shape[3] == (window or 0)


class _PackedLayerMixin:
    forward: PackedForward
    index: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new states on untouched: attention stores them."""
        self.forward.fresh[self.index] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Positions are in the step's `position_ids`; there is no common past."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, PACKED_OFFSET


class PackedLayer(_PackedLayerMixin, DynamicLayer):
    """A full-attention layer of a packed forward."""


class PackedSlidingWindowLayer(_PackedLayerMixin, DynamicSlidingWindowLayer):
    """A sliding-window layer of a packed forward."""


class PackedCache(Cache):
    """The cache that a packed forward is given. It stores nothing: the layers' attention does.

    Parameters
    ----------
    forward : PackedForward
        Has no reference to the cache, so that both are gone with the forward's last frame.
    """

    def __init__(self, forward: PackedForward):
        windows = {index: metadata.window for index, (_, metadata) in forward.inputs.layers.items()}
        super().__init__(layers=[_make_layer(forward, index, windows.get(index)) for index in range(max(windows) + 1)])


def _make_layer(forward: PackedForward, index: int, window: int | None) -> CacheLayerMixin:
    layer = PackedLayer() if window is None else PackedSlidingWindowLayer(sliding_window=window)
    layer.forward, layer.index = forward, index
    return layer
