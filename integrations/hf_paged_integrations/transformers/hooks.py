"""The hooks in transformers: installed by `enable`, taken out again by `disable`.

Ten places are touched, and only for models and caches whose attention implementation is "paged": the registries of
attention and mask functions, ``DynamicCache.__init__`` (its layers become paged), and
``PreTrainedModel.get_correct_attn_implementation`` (a model that cannot be paged is refused; of one that can, the
forwards are kept on a stack). ``GenerationMixin._sample`` runs the rows of paged models packed; ``_beam_search`` and
``_assisted_decoding`` reserve their blocks first. ``Pipeline.get_iterator`` runs the items of their text-generation
pipelines together. Two functions of transformers' continuous batching take such models as they are.
"""

import functools
import threading
from collections.abc import Callable

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    TextGenerationPipeline,
)

from hf_paged.attention.mask import paged_mask
from hf_paged.cache.layers import page_layers
from hf_paged.compat import transformers as upstream
from hf_paged.compat.requirements import check_transformers, transformers_version
from hf_paged.errors import PagedError
from hf_paged.execution import captured_steps
from hf_paged.models import forward_context, registration, registry
from hf_paged.reasons import Reason
from hf_paged.sampling.row_streamer import RowStreamer, by_rows
from hf_paged_integrations.pipelines.text_generation import iterate
from hf_paged_integrations.transformers import version_gate
from hf_paged_integrations.transformers.continuous_batching import (
    attention_forward,
    is_mask_needed,
    leave_config_alone,
    switch_attention,
)
from hf_paged_integrations.transformers.generate import scheduled_sample
from hf_paged_integrations.transformers.model_support import resolve_implementation
from hf_paged_integrations.transformers.upstream_loop import run_upstream_loop

NAME = "paged"
_GUARDS = "_hf_paged_guards"
_WRAPPED = "_hf_paged_original"
_lock = threading.Lock()


def enable() -> None:
    """Make ``attn_implementation="paged"`` known to transformers. Idempotent; `disable` undoes it.

    Raises
    ------
    PagedError
        If this transformers is too old, or its functions are not what hf_paged expects. Nothing is changed then.
    """
    with _lock:
        check_transformers()
        _check_functions()
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, paged_mask)
        _wrap(upstream.CACHE_CONSTRUCTOR, _after(_page_new_cache))
        _wrap(upstream.ATTENTION_CHOICE, _after(_track_paged_model))
        _wrap(upstream.SAMPLING_LOOP, _sample)
        _wrap(upstream.BEAM_SEARCH_LOOP, _for_paged(run_upstream_loop))
        _wrap(upstream.ASSISTED_LOOP, _for_paged(run_upstream_loop))
        _wrap(upstream.PIPELINE_ITERATOR, _get_iterator)
        _wrap(upstream.ATTENTION_SWITCH, switch_attention)
        _wrap(upstream.MASK_RULE, _after(is_mask_needed))
        registration.turn(on=True)
        version_gate.arm()


def disable() -> None:
    """Put transformers back as it was. Idempotent.

    Models that are still "paged" cannot run until `enable` is called or another implementation is set
    with ``model.set_attn_implementation``: they raise `PagedError`, and so do forwards that are under way.
    """
    with _lock:
        registration.turn(on=False)
        captured_steps.drop_all(Reason.DISABLED)
        upstream.unregister_attention(NAME)
        for function in upstream.WRAPPED_FUNCTIONS:
            original = getattr(function.current(), _WRAPPED, None)
            if original is not None:
                function.replace(original)


def is_enabled() -> bool:
    """Tell whether "paged" is registered with transformers."""
    return upstream.is_attention_registered(NAME)


def _check_functions() -> None:
    for function in upstream.WRAPPED_FUNCTIONS:
        if not function.is_as_expected():
            raise PagedError(
                f"{function} of transformers {transformers_version()} takes other arguments than hf_paged expects "
                "(is it patched by another library?): hf_paged stays disabled"
            )


def _wrap(function: upstream.UpstreamFunction, around: Callable) -> None:
    """Let ``around(original, instance, *args, **kwargs)`` stand for a function of transformers."""
    original = function.current()
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        return around(original, self, *args, **kwargs)

    setattr(wrapper, _WRAPPED, original)
    function.replace(wrapper)


def _after(function: Callable) -> Callable:
    """Let ``function(instance, result, *args, **kwargs)`` decide what a method returns."""
    return lambda original, self, *args, **kwargs: function(self, original(self, *args, **kwargs), *args, **kwargs)


def _is_paged(model: PreTrainedModel) -> bool:
    """Tell whether the attention implementation of a model, or of its decoder, is "paged"."""
    return upstream.attention_implementation(model.config.get_text_config(decoder=True)) == NAME


def _for_paged(loop: Callable) -> Callable:
    """Let ``loop(original, model, ...)`` decode for "paged" models, and the original for all others."""

    def decode(original, model, *args, **kwargs):
        if not _is_paged(model):
            return original(model, *args, **kwargs)
        version_gate.enter()
        registry.renew_pools(model)
        times_off = registration.times_off()
        try:
            output = loop(original, model, *args, **kwargs)
        except KeyError as error:
            # A layer looked for its attention function, or the model for its mask.
            if NAME in str(error) and times_off != registration.times_off():
                registration.refuse_result(model)
            raise
        # Masks of a static cache are made between the forwards.
        if times_off != registration.times_off() and getattr(
            kwargs.get(upstream.CACHE_ARGUMENT), "is_compileable", False
        ):
            registration.refuse_result(model)
        return output

    return decode


def _sample(original: Callable, model: PreTrainedModel, *args, **kwargs):
    """``GenerationMixin._sample``. A `RowStreamer` is told of an error, wherever it is raised."""
    streamer, sample = kwargs.get("streamer"), by_rows(original)
    try:
        return _for_paged(scheduled_sample)(sample, model, *args, **kwargs)
    except BaseException as error:
        if isinstance(streamer, RowStreamer):
            streamer.fail(error)
        raise


def _get_iterator(original: Callable, pipe, *args, **kwargs):
    """``Pipeline.get_iterator``: the items of a text-generation pipeline of a paged model run together."""
    is_ours = isinstance(pipe, TextGenerationPipeline) and isinstance(pipe.model, PreTrainedModel)
    is_ours = is_ours and _is_paged(pipe.model)
    return iterate(original, pipe, *args, **kwargs) if is_ours else original(pipe, *args, **kwargs)


def _page_new_cache(
    cache: DynamicCache, _, ddp_cache_data=None, config=None, offloading=False, *args, **kwargs
) -> None:
    """``DynamicCache.__init__``: the layers of a paged model's cache become paged."""
    if type(cache) is not DynamicCache or config is None or ddp_cache_data is not None or offloading:
        return
    text = config.get_text_config(decoder=True)
    if upstream.attention_implementation(text) == NAME and not upstream.hides_recurrent_layers(text):
        page_layers(cache)


def _track_paged_model(model: PreTrainedModel, implementation: str, *args, **kwargs) -> str:
    """``PreTrainedModel.get_correct_attn_implementation``: from now on the model's forwards are known, or no longer."""
    if implementation == NAME:
        implementation = resolve_implementation(model, NAME)
    # One check serves all the models that share this config: a base model inside its ForCausalLM.
    for module in model.modules():
        if module is model or (isinstance(module, PreTrainedModel) and module.config is model.config):
            (_track if implementation == NAME else _untrack)(module)
    return implementation


def _track(model: PreTrainedModel) -> None:
    forward_context.track(model)
    if _GUARDS not in model.__dict__:
        model.__dict__[_GUARDS] = (
            model.register_forward_pre_hook(_check_begin),
            model.register_forward_pre_hook(leave_config_alone, with_kwargs=True),
            model.register_forward_hook(_check_end, prepend=True),  # While the forward is on the stack.
        )


def _untrack(model: PreTrainedModel) -> None:
    forward_context.untrack(model)
    for hook in model.__dict__.pop(_GUARDS, ()):
        hook.remove()


def _check_begin(model: PreTrainedModel, args: tuple) -> None:
    # A model may have got another implementation unnoticed, while the hooks were out.
    if torch.compiler.is_compiling():
        return
    if not registration.is_on() and _is_paged(model):
        registration.refuse(model)
    version_gate.enter()


def _check_end(model: PreTrainedModel, args: tuple, output: object) -> None:
    forward = None if torch.compiler.is_compiling() else forward_context.current_forward()
    if forward is None or not forward.is_of(model):
        return
    if forward.times_off != registration.times_off() and _is_paged(model):
        registration.refuse_result(model)
