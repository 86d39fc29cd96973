"""Footprint: what a model caches for each token, learned from its config alone."""

import copy
import functools
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import logging

from hf_paged.cache.layers import PagedLayer
from hf_paged.cli.demo_model import load_config
from hf_paged.compat.transformers import CACHE_ARGUMENT, has_model_for
from hf_paged.errors import PagedError
from hf_paged.execution.workspace import WorkspaceMeter
from hf_paged.memory.sizing import Workspace
from hf_paged_integrations.transformers.hooks import NAME

DEMO = "demo"


@dataclass(frozen=True)
class LayerStates:
    """The keys and values that one layer stores of one token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def __str__(self):
        return f"{self.num_kv_heads} x ({self.key_dim} + {self.value_dim})"


@dataclass(frozen=True)
class GroupFootprint:
    """The layers of one KV cache group: those with the same window."""

    window: int | None
    layers: tuple[LayerStates, ...]

    @property
    def elements(self) -> int:
        """Numbers stored for one token, in all layers."""
        return sum(layer.elements for layer in self.layers)


@dataclass(frozen=True)
class Footprint:
    """A model's cache, token by token.

    Attributes
    ----------
    groups : tuple of GroupFootprint
        The KV cache groups, full attention first.
    num_paged_layers : int
        Layers of the cache that are paged, those that never store anything included: the pool divides
        its budget by this count.
    num_parameters : int
        Of the whole model; weights tied to each other count once.
    state_bytes : int
        Bytes that recurrent layers keep for each row, however long it is.
    other_layers : dict of str to int
        Layers whose keys and values stay in transformers' own cache, by class name.
    sinks_dtype : torch.dtype or None
        Of the attention sinks; None: it has none.
    workspace : Workspace
        What a step takes beside weights and cache, in this dtype.
    num_linear_parameters : int
        Weights of linear layers, each layer's, tied or not: those that `prepack_weights` lays out a second time.
    """

    model_type: str
    dtype: torch.dtype
    groups: tuple[GroupFootprint, ...]
    num_paged_layers: int
    num_parameters: int
    state_bytes: int
    other_layers: dict[str, int]
    sinks_dtype: torch.dtype | None
    workspace: Workspace
    num_linear_parameters: int


def read_config(name: str) -> PreTrainedConfig:
    """The config of a hub model, of a local folder, or of the demo model (``"demo"``).

    Raises
    ------
    PagedError
        If there is none, in one sentence.
    """
    if name == DEMO:
        return load_config()
    try:
        # Not asked for: by default transformers would offer to run the code of the folder.
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # Each kind of broken config raises an exception of its own.
        if os.path.isdir(name):
            raise PagedError(f"the folder {name} holds no config that transformers can read: {_line(error)}") from error
        reason = "HF_HUB_OFFLINE is set, and the hub's local cache lacks it" if is_offline_mode() else _line(error)
        raise PagedError(
            f"no config found for {name}: it is no local folder, and not to be had from the hub ({reason}). "
            f"Check the name, or name a folder with a config.json, or name the demo model, {DEMO}"
        ) from error


def footprint(config: PreTrainedConfig, dtype: torch.dtype) -> Footprint:
    """Build the model without weights, run one token through it, and look at the cache it leaves.

    Config fields mean different things in different families; what a layer really stores does not.

    Raises
    ------
    PagedError
        If the model cannot be built as "paged", cannot run without weights, or has nothing to page.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise PagedError(
            f"{kind} is an encoder-decoder: its cross-attention depends on the source, which plan does not know; "
            "measure with hf_paged.stats(model)"
        )
    try:
        model, cache, workspace = _run_without_weights(config, dtype)
    except PagedError as error:
        raise PagedError(
            f'{kind} cannot be planned, for it is refused with attn_implementation="{NAME}": {error}'
        ) from error
    except Exception as error:  # Any code of any model may stumble over tensors without content.
        raise PagedError(
            f'{kind} cannot be planned: with attn_implementation="{NAME}" and without weights it does not run '
            f"({type(error).__name__}: {_line(error)}); if it does with its weights, hf_paged.stats(model) measures it"
        ) from error
    groups = _groups(kind, cache)
    # Without weights the cache is transformers' own, and grows beside what the forward needs.
    stored = sum(group.elements for group in groups) * dtype.itemsize
    workspace = replace(workspace, token_bytes=max(0, workspace.token_bytes - stored))
    return Footprint(
        kind,
        dtype,
        groups,
        sum(isinstance(layer, PagedLayer) for layer in cache.layers),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(map(_state_bytes, cache.layers)),
        dict(Counter(type(layer).__name__ for layer in cache.layers if _keeps_own_states(layer))),
        next((values.dtype for name, values in model.named_parameters() if name.endswith(".sinks")), None),
        workspace,
        sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)),
    )


def _groups(kind: str, cache: DynamicCache) -> tuple[GroupFootprint, ...]:
    """The KV cache groups of a cache that holds one token, full attention first."""
    groups: dict[int | None, list[LayerStates]] = {}
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer) or (keys := layer.keys) is None or (values := layer.values) is None:
            continue
        if keys.shape[2] != 1:
            raise PagedError(f"{kind} cannot be planned: it caches {keys.shape[2]} positions for one token")
        shape = LayerStates(keys.shape[1], keys.shape[3], values.shape[3])
        groups.setdefault(layer.window, []).append(shape)
    if not groups:
        raise PagedError(f"{kind} has nothing to plan: no layer of its cache lies in pages")
    ordered = sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0])
    return tuple(GroupFootprint(window, tuple(layers)) for window, layers in ordered)


def _keeps_own_states(layer: object) -> bool:
    """Tell whether a layer's keys and values stay in transformers' own cache."""
    return not isinstance(layer, PagedLayer) and getattr(layer, "keys", None) is not None


def _state_bytes(layer: object) -> int:
    """Bytes that a recurrent layer keeps of one row; 0 for others."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return 0
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(state.nbytes for state in states if state is not None)


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")


def _logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """The logits of one row, ``[tokens, vocab]``."""
    return model(use_cache=True, **inputs).logits[0]


def _run_without_weights(
    config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, DynamicCache, Workspace]:
    """The model on the meta device, its cache after one token, and what its forwards allocate."""
    config = copy.deepcopy(config)
    config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = None  # Or some look for pads in the ids.
    is_text = has_model_for(AutoModelForCausalLM, config) or not has_model_for(AutoModelForImageTextToText, config)
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Advice about weights and speed does not concern a model without weights.
    try:
        with torch.device("meta"), torch.no_grad():
            # The other ways to run experts sort tokens by expert, which a tensor without content cannot do.
            model = auto.from_config(config, attn_implementation=NAME, dtype=dtype, experts_implementation="batched_mm")
            meter, caches = WorkspaceMeter(gathers_experts=True), []
            for num_tokens in (1, 3):
                caches.append(DynamicCache(config=model.config))
                ids = torch.zeros(1, num_tokens, dtype=torch.long)
                run = functools.partial(_logits, model.eval(), input_ids=ids, **{CACHE_ARGUMENT: caches[-1]})
                meter.run(run, num_tokens)
    finally:
        logging.set_verbosity(verbosity)
    return model, caches[0], meter.workspace()
