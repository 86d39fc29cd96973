"""``generate``'s decoding loop for "paged" models: packed rows on the engine, or the original loop and why."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from hf_paged import exit_report
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.errors import UnsupportedError
from hf_paged.execution.packed_cache import NotPackableError
from hf_paged.generation.cache_handoff import why_not_hand_over
from hf_paged.generation.engine import Engine
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.models import registry
from hf_paged.models.refusal import Refusal
from hf_paged.models.structure import training_state
from hf_paged.reasons import Why, count_and_log
from hf_paged_integrations.transformers import trial
from hf_paged_integrations.transformers.eligibility import LoopArguments, start_device, why_not_this_call
from hf_paged_integrations.transformers.upstream_loop import at_home, run_upstream_loop
from hf_paged_kernels.faults import is_device_fault

# What ``GenerationMixin._sample`` returns: the tokens, or them and more.
Output = torch.Tensor | GenerateDecoderOnlyOutput


@at_home
def scheduled_sample(
    original: Callable[..., Output],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> Output:
    """``GenerationMixin._sample`` of a "paged" model; `original` is transformers' own."""
    arguments = LoopArguments(
        input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
    )
    why = why_not_this_call(model, arguments)
    if why is None:
        output = _run_packed(model, arguments)
        if not isinstance(output, Why):
            exit_report.note(model)
            return output
        why = output
    output = run_upstream_loop(
        original,
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
        **model_kwargs,
    )
    count_and_log(registry.counts_of(model).fallbacks, why, "generate runs transformers' own loop, not packed")
    exit_report.note(model)
    return output


def engine_for(model: PreTrainedModel, device: torch.device) -> Engine | Refusal:
    """The engine of a model, or why it has none.

    Where the model has no engine yet, or its refusal is in doubt, the model is tried, with a few tiny forwards. So
    it is in each state that it has in training mode. Other calls that begin meanwhile wait for the outcome.
    """
    training = training_state(model)
    with registry.trial_lock():
        engine = registry.engine_of(model, training)
        if engine is None:
            made = trial.make_engine(model, device, may_draw=training is None)
            engine = registry.keep_engine(model, made, training)
    assert isinstance(engine, Engine | Refusal), "the registry keeps what was given to it"
    return engine


def _run_packed(model: PreTrainedModel, arguments: LoopArguments) -> Output | Why:
    """Run a call's rows on the model's engine: its output, or the reason why they cannot run there."""
    output = _run_on_engine(model, arguments, may_retry=True)
    if output is None:
        output = _run_on_engine(model, arguments, may_retry=False)
        assert output is not None
    return output


def _run_on_engine(model: PreTrainedModel, arguments: LoopArguments, may_retry: bool) -> Output | Why | None:
    """As `_run_packed`; None if the model has changed since its engine was made, and the next try gets a new one."""
    engine = engine_for(model, start_device(model, arguments.input_ids.device))
    if isinstance(engine, Refusal):
        return engine.why
    cache, config = arguments.returned_cache, arguments.generation_config
    if cache is not None and (why := why_not_hand_over(cache, engine.pool)) is not None:
        return why
    call = GenerateCall(
        arguments.input_ids,
        None if arguments.attention_mask is None else arguments.attention_mask.bool(),
        arguments.logits_processor,
        arguments.stopping_criteria,
        config,
        arguments.streamer,
        engine.block_pools,
        cache=cache,
    )
    try:
        sequences = engine.run(model, call)
    except NotPackableError as error:
        if call.has_begun:
            raise UnsupportedError(
                f"{type(model).__name__} was changed while it generated: {error}. Call generate again"
            ) from error
        registry.forget_engine(model, engine)
        return None if may_retry else error.why
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        # Is the model the one that its engine was made for? It may have been moved, or got layers of another kind.
        is_lost = call.has_begun or not may_retry or is_device_fault(error)
        if is_lost or not registry.is_outdated(model, engine):
            raise
        registry.renew_pools(model, even_good=True)
        return None
    registry.counts_of(model).packed += 1
    if not config.return_dict_in_generate:
        return sequences
    # The annotations of the class are narrower than what transformers' own loop gives it.
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=call.scores,  # type: ignore[arg-type]
        logits=call.logits,  # type: ignore[arg-type]
        **{CACHE_ARGUMENT: cache},  # type: ignore[arg-type]
    )
