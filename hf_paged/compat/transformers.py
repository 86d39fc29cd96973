"""Private names of transformers, and undocumented ones that the hooks wrap or the attention path recognises."""

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    Pipeline,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextGenerationPipeline,
    masking_utils,
    modeling_layers,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager, input_outputs
from transformers.generation.continuous_batching import cache as continuous_batching_cache
from transformers.integrations import eager_paged, sdpa_attention, sdpa_paged
from transformers.utils import output_capturing

# Functions that hf_paged wraps


@dataclass(frozen=True)
class UpstreamFunction:
    """A function of transformers that a hook stands in for.

    Attributes
    ----------
    owner : type or module
        Its namespace, in which the hook replaces it.
    name : str
    parameters : tuple of str
        Their names as the hooks expect them: by these a patch of another library, or another transformers, is found.
        The hooks hand all others on untouched, where these may be left out.
    """

    owner: type | types.ModuleType
    name: str
    parameters: tuple[str, ...]

    def current(self) -> Any:
        """The function that stands in its place now: transformers' own, or a wrapper of it."""
        return self.owner.__dict__[self.name]

    def replace(self, function: Callable) -> None:
        """Put `function` in its place."""
        setattr(self.owner, self.name, function)

    def is_as_expected(self) -> bool:
        """Tell whether it takes the parameters that hf_paged was written for, under whatever wraps it."""
        found = inspect.signature(inspect.unwrap(self.current())).parameters.values()
        needed = [one.name for one in found if one.name in self.parameters or one.default is one.empty]
        return tuple(needed) == self.parameters

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


_LOOP = ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus")
_ASSISTANT = ("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")
_STAGES = ("num_workers", "batch_size", "preprocess_params", "forward_params", "postprocess_params")

CACHE_CONSTRUCTOR = UpstreamFunction(
    DynamicCache, "__init__", ("self", "ddp_cache_data", "config", "offloading", "offload_only_non_sliding")
)
"""Makes the layers of a new cache. A cache class is no choice of `generate`'s callers while they leave it alone."""

ATTENTION_CHOICE = UpstreamFunction(
    PreTrainedModel, "get_correct_attn_implementation", ("self", "requested_attention", "is_init_check")
)
"""Where each model settles on an implementation, at loading and at ``set_attn_implementation`` alike."""

SAMPLING_LOOP = UpstreamFunction(GenerationMixin, "_sample", (*_LOOP, "streamer", "model_kwargs"))
"""The decoding loop of greedy search and sampling. ``generate(custom_generate=...)`` asks each caller to change."""

BEAM_SEARCH_LOOP = UpstreamFunction(GenerationMixin, "_beam_search", (*_LOOP, "model_kwargs"))
"""The decoding loop of beam search."""

ASSISTED_LOOP = UpstreamFunction(
    GenerationMixin, "_assisted_decoding", (*_LOOP, "streamer", *_ASSISTANT, "model_kwargs")
)
"""The decoding loop of assisted decoding and prompt lookup."""

PIPELINE_ITERATOR = UpstreamFunction(Pipeline, "get_iterator", ("self", "inputs", *_STAGES))
"""Chains the loader, the forwards and the postprocessing of a pipeline's items. No argument replaces a stage."""

ATTENTION_SWITCH = UpstreamFunction(ContinuousBatchingManager, "switch_to_cb_friendly_attn", ("self", "model"))
"""Where continuous batching changes a model's implementation to one that suits it. It knows transformers' own only."""

MASK_RULE = UpstreamFunction(input_outputs, "attn_mask_is_needed", ("config",))
"""Tells continuous batching which implementations want a mask. It compares names, and has no registry."""

WRAPPED_FUNCTIONS = (
    CACHE_CONSTRUCTOR,
    ATTENTION_CHOICE,
    SAMPLING_LOOP,
    BEAM_SEARCH_LOOP,
    ASSISTED_LOOP,
    PIPELINE_ITERATOR,
    ATTENTION_SWITCH,
    MASK_RULE,
)
"""Every function that the hooks replace, in the order in which they put the originals back."""

# Configs and models


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The attention implementation of the (text) config that a model runs by.

    Reads ``PreTrainedConfig._attn_implementation``: models choose their attention function by it, and the public
    ``attn_implementation`` is an argument of their constructors only.
    """
    return config._attn_implementation


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Tell whether a model may attend with sdpa: ``PreTrainedModel._supports_sdpa``, which only its author sets."""
    return model._supports_sdpa


def supports_flash_attention(model: PreTrainedModel) -> bool:
    """Tell whether a model may use flash attention: ``PreTrainedModel._supports_flash_attn``, set by its author."""
    return model._supports_flash_attn


supports_logits_to_keep: Callable[[PreTrainedModel], bool] = operator.methodcaller("_supports_logits_to_keep")
"""Tell whether a model that generates can compute the logits of chosen positions only.

Asks ``GenerationMixin._supports_logits_to_keep``: `generate` does, and hands ``logits_to_keep`` to such models alone.
"""


def attention_classes(kind: type[PreTrainedModel]) -> tuple[str, dict[str, type] | None]:
    """The table of attention classes in the modelling file of `kind`, or of a base of it, and the table's name.

    Files that do not call the attention interface keep a ``..._ATTENTION_CLASSES`` by implementation. No flag of their
    models tells them from the others.

    Returns
    -------
    (name, table)
        ``("", None)`` if there is none.
    """
    for base in kind.__mro__:
        for name, value in vars(sys.modules.get(base.__module__, object)).items():
            if name.endswith("ATTENTION_CLASSES") and isinstance(value, dict):
                return name, value
    return "", None


def has_model_for(auto_class: Any, config: PreTrainedConfig) -> bool:
    """Tell whether ``auto_class.from_config(config)`` knows a model class.

    Looks into the class's ``_model_mapping``: the public way is to try, which makes a model.
    """
    return type(config) in auto_class._model_mapping


def hides_recurrent_layers(config: PreTrainedConfig) -> bool:
    """Tell whether a (text) config has recurrent layers of which transformers' cache knows nothing.

    RecurrentGemma's had no ``layer_types`` before its cache got layers of their kind: it has attention layers for all
    of them, and the model takes its masks from one that is never filled.
    """
    return not hasattr(config, "layer_types") and "recurrent" in getattr(config, "layers_block_type", ())


# Attention functions


def is_attention_registered(name: str) -> bool:
    """Tell whether ``AttentionInterface.register`` was called with `name`.

    Looks into ``AttentionInterface._global_mapping``: an instance shows what was set on it alone as well.
    """
    return name in AttentionInterface._global_mapping


def unregister_attention(name: str) -> None:
    """Take an implementation's attention and mask functions out again. Idempotent.

    Pops from ``_global_mapping`` of both interfaces, to which ``register`` adds. They offer no way back.
    """
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


output_collector = output_capturing._active_collector
"""A `ContextVar` of the outputs that a forward's caller wants, by name, such as "attentions"; None outside a forward.

``transformers.utils.output_capturing._active_collector``: not every model passes ``output_attentions`` down.
"""

# Masks: a mask function is all that a model says about its attention pattern, and has no attributes that tell it

causal_mask_function = masking_utils.causal_mask_function
"""The mask function of plain causal attention, known by identity."""

bidirectional_mask_function = masking_utils.bidirectional_mask_function
"""The mask function of attention to everything, known by identity."""

eager_mask = masking_utils.eager_mask
"""Makes the additive mask of eager attention; takes the arguments of the documented ``sdpa_mask``."""


def intersected_masks(mask_function: Callable) -> tuple[Callable, ...] | None:
    """The mask functions of which ``masking_utils.and_masks`` made this one; None if it did not.

    Reads the closure of ``and_masks.<locals>.and_mask``.
    """
    if not _is_made_by(mask_function, "and_masks.<locals>.and_mask"):
        return None
    return _closure(mask_function)["mask_functions"]


def sliding_window_of(mask_function: Callable) -> int | None:
    """The window of which ``masking_utils.sliding_window_overlay`` made this mask function; None if it did not.

    Reads the closure of ``sliding_window_overlay.<locals>.inner_mask``.
    """
    if not _is_made_by(mask_function, "sliding_window_overlay.<locals>.inner_mask"):
        return None
    return _closure(mask_function)["sliding_window"]


def is_hooked_by_accelerate(module: torch.nn.Module) -> bool:
    """Tell whether accelerate runs a hook around the forward of a module: ``Module._hf_hook``, its mark."""
    return "_hf_hook" in vars(module)


ATTRIBUTES_OF_ACCELERATE = frozenset({"_hf_hook", "_old_forward", "forward"})
"""Attributes that accelerate's hook sets on a module. It moves what the module computes with, and changes no result."""

LOADING_MARK = "_is_hf_initialized"
"""The attribute with which ``from_pretrained`` and ``_init_weights`` mark what is loaded or initialised."""

CONFIG_SOURCE = "_name_or_path"
"""The field of a config's dictionary that says where the model was loaded from."""


def _is_made_by(function: Callable, qualname: str) -> bool:
    if isinstance(function, functools.partial):
        return False
    return getattr(function, "__module__", None) == masking_utils.__name__ and function.__qualname__ == qualname


def _closure(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


# generate


def _cache_argument() -> str:
    parameters = inspect.signature(inspect.unwrap(GenerationMixin.prepare_inputs_for_generation)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


CACHE_ARGUMENT = _cache_argument()
"""The name under which models, decoding loops and their outputs have the cache: "past_key_values", later "cache".

Asks ``GenerationMixin.prepare_inputs_for_generation``, which hands it to every model. Models that take "cache" accept
the older name as well, and say that it is deprecated.
"""

# A decoding loop calls these besides the forward, and a model may have its own version of each.
_LOOP_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill")


@functools.cache
def checkpointing_takes_the_cache() -> bool:
    """Tell whether checkpointed layers in training mode get no cache even where no gradients are recorded.

    Asks a layer of ``modeling_layers.GradientCheckpointingLayer``, as every checkpointed layer of transformers is.
    """

    class Layer(modeling_layers.GradientCheckpointingLayer):
        gradient_checkpointing = True

        def forward(self, **kwargs):
            return kwargs[CACHE_ARGUMENT]

    layer, cache = Layer().train(), object()
    layer._gradient_checkpointing_func = lambda function: function()  # type: ignore[assignment]  # It is no submodule.
    logger, was_disabled = modeling_layers.logger, modeling_layers.logger.disabled
    logger.disabled = True  # It says that caching is incompatible with checkpointing.
    try:
        with torch.no_grad():
            return layer(**{CACHE_ARGUMENT: cache}) is not cache
    finally:
        logger.disabled = was_disabled


def replaced_loop_method(model: PreTrainedModel) -> str | None:
    """The name of a method of `GenerationMixin` that decoding loops call and `model` replaces; None if there is none.

    Compares ``prepare_inputs_for_generation``, ``_update_model_kwargs_for_generation`` and ``_prefill`` of the model
    itself, not of its class: PEFT gives one to the instance, for the time of a call.
    """
    for name in _LOOP_METHODS:
        if getattr(getattr(model, name), "__func__", None) is not getattr(GenerationMixin, name):
            return name
    return None


def pad_token(config: GenerationConfig) -> torch.Tensor | None:
    """The pad token that a decoding loop writes after a row's end, a scalar on the model's device.

    Reads ``_pad_token_tensor``, which `generate` sets on its copy of the config: it falls back on the end token, as
    the public ``pad_token_id`` does not.
    """
    return config._pad_token_tensor


def is_callers_cache(cache: Cache) -> bool:
    """Tell whether the caller of `generate` gave it the cache, and so reads it afterwards.

    Reads ``_is_user_defined``, which `generate` sets on such a cache and tells its loop by no argument.
    """
    return getattr(cache, "_is_user_defined", False)


_prepare = operator.attrgetter("_prepare_generation_config")


def complete_generation_config(
    model: PreTrainedModel, config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The config that `generate` would run by, and the options that are no generation parameters.

    Calls ``GenerationMixin._prepare_generation_config``: the public ``GenerationConfig.update`` knows nothing of the
    model's own config and of defaults.
    """
    return _prepare(model)(config, **options)


# Pipelines


def has_own_forward(pipe: TextGenerationPipeline) -> bool:
    """Tell whether a pipeline's class replaces how a batch is run: ``forward``, or the ``_forward`` that it calls."""
    kind = type(pipe)
    return kind._forward is not TextGenerationPipeline._forward or kind.forward is not Pipeline.forward


def generate_options(pipe: TextGenerationPipeline, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which a pipeline's forward would call `generate`, besides its inputs.

    Calls ``TextGenerationPipeline._prepare_generate_kwargs``, which adds the defaults of the pipeline. There is no
    public view of these. Pipelines without it have all of them in their ``generation_config``.
    """
    prepare = getattr(pipe, "_prepare_generate_kwargs", None)
    return {"generation_config": vars(pipe)["generation_config"], **options} if prepare is None else prepare(options)


def replace_forwards(results: Any, outputs_of: Callable[[Iterable, Callable, dict[str, Any]], Iterable]) -> None:
    """Let ``outputs_of(batches, forward, params)`` yield what the forwards of a pipeline did.

    Parameters
    ----------
    results : PipelineIterator
        What ``Pipeline.get_iterator`` returned. Its ``loader`` is the `PipelineIterator` that yields
        ``infer(batch, **params)`` of each batch of its own ``loader``: that one is changed in place.
    """
    forwards = results.loader
    forwards.loader = outputs_of(forwards.loader, forwards.infer, forwards.params)
    forwards.infer, forwards.params = _unchanged, {}


def _unchanged(outputs: Any) -> Any:
    return outputs


# Continuous batching

ContinuousBatchingCache = continuous_batching_cache.PagedAttentionCache
"""The cache of transformers' continuous batching. Its attention calls are known by nothing but the cache they carry."""

attend_to_continuous_batch_with_sdpa = (
    sdpa_attention.sdpa_attention_forward
    if "cache" in inspect.signature(sdpa_attention.sdpa_attention_forward).parameters
    else sdpa_paged.sdpa_attention_paged_forward
)
"""Attention by sdpa over a `ContinuousBatchingCache`: sdpa's own function, or one beside it in older versions."""

attend_to_continuous_batch = eager_paged.eager_paged_attention_forward
"""Eager attention over a `ContinuousBatchingCache`: what transformers registers as "paged|eager"."""


def sanitizes_chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer can encode the names of control tokens in a chat's messages as plain text."""
    return "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters
