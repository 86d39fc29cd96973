"""Which calls of ``generate`` can run packed with the results of transformers' own loop, and why others cannot.

Each ``_why_not_...`` returns the first reason that it finds, or None. They are in the order in which they are asked.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from hf_paged.cache.layers import PagedLayer
from hf_paged.cache.padding import Padding, is_binary
from hf_paged.compat.generate_frame import names_passed_to_generate
from hf_paged.compat.torch import forward_pre_hooks
from hf_paged.compat.transformers import (
    CACHE_ARGUMENT,
    checkpointing_takes_the_cache,
    is_callers_cache,
    replaced_loop_method,
    supports_logits_to_keep,
)
from hf_paged.reasons import Reason, Why
from hf_paged.sampling.processors import is_by_row
from hf_paged.sampling.rng_replay import Draws, draws_of, is_replaying, is_unseeded
from hf_paged.sampling.row_streamer import RowStreamer

# Everything `generate` itself adds for a text model; what else is there came from the caller.
# The tokenizer is there for stop strings, whose criterion has it already.
_MODEL_ARGUMENTS = {"attention_mask", "position_ids", CACHE_ARGUMENT, "logits_to_keep", "use_cache", "tokenizer"}
# What `generate` makes of what its caller passed, or sets in the config.
_DERIVED_ARGUMENTS = {
    "cache_params",
    "encoder_outputs",
    "inputs_embeds",
    "mm_encoder_outputs",
    "output_attentions",
    "output_hidden_states",
}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Frequencies of these depend on the longest position of the whole forward, not on a row's own.
_ROPE_OF_THE_FORWARD = {"dynamic", "longrope"}


@dataclass(frozen=True)
class LoopArguments:
    """The arguments of a decoding loop, as ``generate`` calls ``GenerationMixin._sample``.

    Attributes
    ----------
    input_ids : torch.Tensor
        ``[batch, positions]``
    model_kwargs : dict of str to object
        What the loop hands on to the model's forward.
    """

    input_ids: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    synced_gpus: bool
    streamer: BaseStreamer | None
    model_kwargs: dict[str, Any]

    @property
    def attention_mask(self) -> torch.Tensor | None:
        return self.model_kwargs.get("attention_mask")

    @property
    def returned_cache(self) -> DynamicCache | None:
        """The call's cache, if the caller will see what the call leaves in it. Of a call that can run packed."""
        cache, config = self.model_kwargs[CACHE_ARGUMENT], self.generation_config
        return cache if config.return_dict_in_generate or is_callers_cache(cache) else None


def why_not_packable(model: PreTrainedModel, config: GenerationConfig) -> Why | None:
    """Why no call with this config runs packed, whatever its inputs; None if calls may.

    Parameters
    ----------
    config : GenerationConfig
        Complete, as ``_prepare_generation_config`` returns it.
    """
    if not config.use_cache or config.cache_implementation is not None:
        return Reason.OTHER_CACHE
    if config.guidance_scale not in (None, 1) or config.watermarking_config is not None:
        return Reason.ROWS_TOGETHER
    device = start_device(model, torch.device("cpu"))
    return _why_not_this_model(model, device) or _why_not_these_options(config, device)


def why_not_this_call(model: PreTrainedModel, arguments: LoopArguments) -> Why | None:
    """Why the engine cannot serve this call with the results of the original loop; None if it can."""
    ids, streamer = arguments.input_ids, arguments.streamer
    streamed_rows = 0 if streamer is None or isinstance(streamer, RowStreamer) else len(ids)
    return (
        _why_not_this_model(model, start_device(model, ids.device))
        or _why_not_these_inputs(ids, arguments.model_kwargs)
        or _why_not_these_options(arguments.generation_config, ids.device, arguments.synced_gpus, streamed_rows)
        or _why_not_this_return(arguments)
        or _why_not_these_processors(ids, arguments.logits_processor)
    )


def start_device(model: PreTrainedModel, inputs_device: torch.device) -> torch.device:
    """Where a forward of the model begins: between forwards, offloaded weights are on "meta"."""
    return inputs_device if model.device.type == "meta" else model.device


def _why_not_this_model(model: PreTrainedModel, device: torch.device) -> Why | None:
    modules = list(model.modules())
    if (why := _why_not_in_training(modules)) is not None:
        return why
    if torch.is_autocast_enabled(device.type):
        return Reason.AUTOCAST
    if model.config.is_encoder_decoder:
        return Reason.ENCODER_DECODER
    if (method := replaced_loop_method(model)) is not None:
        return Reason.OWN_METHOD.of(method)
    if not supports_logits_to_keep(model):
        return Reason.EVERY_LOGIT
    if any(_is_of_peft(hook) for module in modules for hook in forward_pre_hooks(module).values()):
        return Reason.ROW_ADAPTERS
    text = model.config.get_text_config(decoder=True)
    ropes = [getattr(text, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    if any(rope.get("rope_type") in _ROPE_OF_THE_FORWARD for rope in ropes):
        return Reason.ROPE_OF_THE_FORWARD
    return None


def _why_not_in_training(modules: list[torch.nn.Module]) -> Why | None:
    """Why modules in training mode cannot run packed, as far as their kinds tell; a trial finds the rest."""
    for module in modules:
        if module.training and isinstance(module, _DROPOUT) and module.p:
            return Reason.TRAINING.of(repr(module))
        if module.training and getattr(module, "gradient_checkpointing", False) and checkpointing_takes_the_cache():
            return Reason.CHECKPOINTING
    return None


def _is_of_peft(hook: Callable) -> bool:
    """Tell whether PEFT made a hook: for the time of a call, they tell its layers something for each row."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    module = getattr(function, "__module__", None)  # None of what `exec` made, or anything at all.
    return isinstance(module, str) and module.startswith("peft.")


def _why_not_these_inputs(ids: torch.Tensor, kwargs: dict[str, Any]) -> Why | None:
    if torch.is_grad_enabled():  # `generate` disables them: it was called by its unwrapped name.
        return Reason.GRADIENTS_ENABLED
    if ids.dtype not in (torch.int32, torch.int64):
        return Reason.ODD_IDS
    extra = sorted(name for name in kwargs.keys() - _MODEL_ARGUMENTS if kwargs[name] is not None)
    if extra:
        return _why_not_these_extra(extra)
    if "update" in vars(DynamicCache):
        return Reason.CHANGED_CACHE_CLASS
    cache = kwargs.get(CACHE_ARGUMENT)
    if type(cache) is not DynamicCache or not kwargs.get("use_cache"):
        return Reason.OTHER_CACHE
    if not all(isinstance(layer, PagedLayer) and not layer.is_dense for layer in cache.layers) or not cache.layers:
        return Reason.UNPAGED_LAYERS
    if cache.get_seq_length():
        return Reason.FILLED_CACHE
    if ids.shape[1] == 0:
        return Reason.EMPTY_PROMPT
    return _why_not_these_positions(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def _why_not_these_extra(names: list[str]) -> Why:
    """Inputs besides tokens: those of the caller, or new ones of a transformers that hf_paged does not know."""
    passed = names_passed_to_generate()
    added = [] if passed is None else [name for name in names if name not in passed | _DERIVED_ARGUMENTS]
    return Reason.ADDED_INPUTS.of(", ".join(added)) if added else Reason.MODEL_INPUTS.of(", ".join(names))


def _why_not_these_positions(
    ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Why | None:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if mask is not None:
        if mask.shape != ids.shape or not Padding(mask.bool()).is_left or not bool(mask[:, -1].all()):
            return Reason.PADDING_NOT_LEFT
        if not is_binary(mask):
            return Reason.MASK_VALUES
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if position_ids is not None and not _are_same(position_ids, positions, mask):
        return Reason.OWN_POSITIONS
    return None


def _are_same(given: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Tell whether positions are the expected ones wherever the mask says that there are tokens."""
    if given.dim() != 2 or given.shape not in (expected.shape, expected[:1].shape):
        return False
    differs = given.to(expected.device) != expected
    return not bool(differs.any() if mask is None else (differs & mask.bool()).any())


def _why_not_these_options(
    config: GenerationConfig, device: torch.device, synced_gpus: bool = False, streamed_rows: int = 0
) -> Why | None:
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return Reason.RETURNED_STATES
    if synced_gpus or config.is_assistant or config.compile_config is not None:
        return Reason.OTHER_FORWARD
    if streamed_rows > 1:
        return Reason.STREAMED_ROWS
    # Without a seed no numbers are expected: they are drawn in any order.
    if config.do_sample and draws_of(device) is Draws.UNKNOWN and is_replaying() and not is_unseeded(device):
        return Reason.DEVICE_NOISE
    return None


def _why_not_this_return(arguments: LoopArguments) -> Why | None:
    """Of several rows dense returns a rectangle, with pads and with what finished rows went on to store."""
    if arguments.returned_cache is None:
        return None
    mask = arguments.attention_mask
    is_full_row = len(arguments.input_ids) == 1 and (mask is None or bool(mask.all()))
    return None if is_full_row else Reason.RETURNED_ROWS


def _why_not_these_processors(ids: torch.Tensor, processors: LogitsProcessorList) -> Why | None:
    """Of one row processors of any kind are called as dense calls them."""
    if len(ids) == 1:
        return None
    mixing = [type(processor).__name__ for processor in processors if not is_by_row(processor)]
    return Reason.PROCESSOR.of(mixing[0]) if mixing else None
