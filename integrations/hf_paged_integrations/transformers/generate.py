"""``generate``'s decoding loop for "paged" models: packed rows on the engine, or the original loop and why."""

import functools

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from hf_paged.atomic import Undo, atomically
from hf_paged.cache.layers import PagedLayer
from hf_paged.cache.padding import Padding, is_binary
from hf_paged.errors import OutOfBlocksError, UnsupportedError
from hf_paged.execution.packed_cache import NotPackableError, pack, run_step
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.generation.cache_handoff import why_not_hand_over
from hf_paged.generation.engine import Engine
from hf_paged.generation.generate_call import ROW_WISE, ROW_WISE_CRITERIA, GenerateCall
from hf_paged.memory.kv_pool import KVPool
from hf_paged.models import forward_context, registry
from hf_paged.reasons import Reason, Why, count_and_log
from hf_paged.sampling.cancellation import Cancellation
from hf_paged.sampling.row_streamer import RowStreamer
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk, Scheduler
from hf_paged_integrations.transformers.upstream_loop import run_upstream_loop

# Everything `generate` itself adds for a text model; what else is there came from the caller.
# The tokenizer is there for stop strings, whose criterion has it already.
_MODEL_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "tokenizer"}
# Frequencies of these depend on the longest position of the whole forward, not on a row's own.
_ROPE_OF_THE_FORWARD = {"dynamic", "longrope"}


def scheduled_sample(
    original,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    **model_kwargs,
):
    """``GenerationMixin._sample`` of a "paged" model; `original` is transformers' own."""
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    why = _why_not_this_call(model, *arguments, synced_gpus)
    if why is None:
        output = _packed(model, *arguments)
        if not isinstance(output, Why):
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
    return output


def _packed(model, input_ids, processors, criteria, config, streamer, kwargs, may_retry: bool = True):
    """Run a call's rows on the model's engine: its output, or the reason why they cannot run there."""
    engine = registry.engine_of(model, lambda model: _make_engine(model, _device_of(model, input_ids)))
    if isinstance(engine, registry.Refusal):
        return engine.why
    mask, cache = kwargs.get("attention_mask"), kwargs["past_key_values"]
    cache = cache if _outlives_call(cache, config) else None
    if cache is not None and (why := why_not_hand_over(cache, engine.pool)) is not None:
        return why
    valid = None if mask is None else mask.bool()
    ids = input_ids.long()  # As they are once dense has appended the first token.
    call = GenerateCall(ids, valid, processors, criteria, config, streamer, engine.block_pools, cache=cache)
    try:
        sequences = engine.run(model, call)
    except NotPackableError as error:
        if call.has_begun:
            raise UnsupportedError(
                f"{type(model).__name__} was changed while it generated: {error}. Call generate again"
            ) from error
        registry.forget_engine(model, engine)
        why = error.why
    except (RuntimeError, ValueError, TypeError, IndexError):
        # Is the model the one that its engine was made for? It may have been moved, or got layers of another kind.
        if call.has_begun or not may_retry or not registry.is_outdated(model, engine):
            raise
        registry.renew_pools(model, even_good=True)
    else:
        registry.counts_of(model).packed += 1
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=call.scores, logits=call.logits, past_key_values=cache
        )
    if not may_retry:
        return why
    return _packed(model, input_ids, processors, criteria, config, streamer, kwargs, may_retry=False)


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
    no_ids = torch.empty(1, 0)
    no_ids = no_ids.to(_device_of(model, no_ids))
    return _why_not_this_model(model, no_ids.device) or _why_not_these_options(config, no_ids, False, None)


def _why_not_this_call(model, ids, processors, criteria, config, streamer, kwargs, synced_gpus) -> Why | None:
    """Why the packed loop cannot serve this call with the results of the original one; None if it can."""
    return (
        _why_not_this_model(model, _device_of(model, ids))
        or _why_not_these_inputs(ids, kwargs)
        or _why_not_these_options(config, ids, synced_gpus, streamer)
        or _why_not_this_cache(ids, config, kwargs)
        or _why_not_these_hooks(processors, criteria)
    )


def _device_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.device:
    """Where a forward of the model begins; between forwards, offloaded weights are on "meta"."""
    return ids.device if model.device.type == "meta" else model.device


def _why_not_this_model(model, device: torch.device) -> Why | None:
    if model.training:
        return Reason.TRAINING
    if torch.is_autocast_enabled(device.type):
        return Reason.AUTOCAST
    if model.config.is_encoder_decoder:
        return Reason.ENCODER_DECODER
    for method in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill"):
        # Asked of the model itself: PEFT gives one to the instance, for the time of a call.
        if getattr(getattr(model, method), "__func__", None) is not getattr(GenerationMixin, method):
            return Reason.OWN_METHOD.of(method)
    if not model._supports_logits_to_keep():
        return Reason.EVERY_LOGIT
    if any(_is_of_peft(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        return Reason.ROW_ADAPTERS
    text = model.config.get_text_config(decoder=True)
    ropes = [getattr(text, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    if any(rope.get("rope_type") in _ROPE_OF_THE_FORWARD for rope in ropes):
        return Reason.ROPE_OF_THE_FORWARD
    return None


def _is_of_peft(hook) -> bool:
    """Whether PEFT made a hook: for the time of a call, they tell its layers something for each row of the batch."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    module = getattr(function, "__module__", None)  # None of what `exec` made, or anything at all.
    return isinstance(module, str) and module.startswith("peft.")


def _why_not_these_inputs(ids: torch.Tensor, kwargs: dict) -> Why | None:
    if torch.is_grad_enabled():  # `generate` disables them: it was called by its unwrapped name.
        return Reason.GRADIENTS_ENABLED
    if ids.dtype not in (torch.int32, torch.int64):
        return Reason.ODD_IDS
    extra = [name for name in kwargs.keys() - _MODEL_ARGUMENTS if kwargs[name] is not None]
    if extra:
        return Reason.MODEL_INPUTS.of(", ".join(sorted(extra)))
    if "update" in vars(DynamicCache):
        return Reason.CHANGED_CACHE_CLASS
    cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache or not kwargs.get("use_cache"):
        return Reason.OTHER_CACHE
    if not all(isinstance(layer, PagedLayer) and not layer.is_dense for layer in cache.layers) or not cache.layers:
        return Reason.UNPAGED_LAYERS
    if cache.get_seq_length():
        return Reason.FILLED_CACHE
    if ids.shape[1] == 0:
        return Reason.EMPTY_PROMPT
    mask = kwargs.get("attention_mask")
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if mask is not None:
        if mask.shape != ids.shape or not Padding(mask.bool()).is_left or not bool(mask[:, -1].all()):
            return Reason.PADDING_NOT_LEFT
        if not is_binary(mask):
            return Reason.MASK_VALUES
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    given = kwargs.get("position_ids")
    if given is not None and not _same_where(given, positions, mask):
        return Reason.OWN_POSITIONS
    return None


def _outlives_call(cache: DynamicCache, config) -> bool:
    """Whether the caller will see what the call leaves in its cache."""
    return bool(config.return_dict_in_generate or getattr(cache, "_is_user_defined", False))


def _same_where(given: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if given.dim() != 2 or given.shape not in (expected.shape, expected[:1].shape):
        return False
    differs = given.to(expected.device) != expected
    return not bool(differs.any() if mask is None else (differs & mask.bool()).any())


def _why_not_these_options(config, ids: torch.Tensor, synced_gpus: bool, streamer) -> Why | None:
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return Reason.RETURNED_STATES
    if synced_gpus or config.is_assistant or config.compile_config is not None:
        return Reason.OTHER_FORWARD
    if streamer is not None and len(ids) > 1 and not isinstance(streamer, RowStreamer):
        return Reason.STREAMED_ROWS
    if config.do_sample and ids.device.type != "cpu":
        return Reason.DEVICE_NOISE
    return None


def _why_not_this_cache(ids: torch.Tensor, config, kwargs: dict) -> Why | None:
    """Of several rows dense returns a rectangle, with pads and with what finished rows went on to store."""
    if not _outlives_call(kwargs["past_key_values"], config):
        return None
    mask = kwargs.get("attention_mask")
    if len(ids) > 1 or not (mask is None or bool(mask.all())):
        return Reason.RETURNED_ROWS
    return None


def _why_not_these_hooks(processors, criteria) -> Why | None:
    unknown = [type(processor).__name__ for processor in processors if type(processor) not in ROW_WISE]
    if unknown:
        return Reason.PROCESSOR.of(unknown[0])
    kinds = {type(criterion) for criterion in criteria}
    if unknown := sorted(kind.__name__ for kind in kinds - ROW_WISE_CRITERIA):
        return Reason.CRITERION.of(unknown[0])
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria) and len(kinds - {Cancellation}) > 1:
        return Reason.ENDLESS_ROWS
    return None


class _ForwardError(Exception):
    """A model's forward has raised its cause."""


def _make_engine(model: PreTrainedModel, device: torch.device) -> Engine | registry.Refusal:
    """The engine of a model, or why it can have none: found out with two tiny forwards.

    They run uncompiled, whatever the user compiled: what they check is not checked again in compiled steps. An error
    is the model's own if it comes again; one that does not, such as that of a signal's handler, is the caller's.
    """
    # The stance is the process's: `engine_of` lets one thread at a time come here.
    with torch.compiler.set_stance("force_eager"):
        try:
            return _tried_engine(model, device)
        except _ForwardError as failure:
            first = failure.__cause__
        try:
            if _fails_again(model, device, type(first)):
                return registry.Refusal(Reason.FAILING_STEP.of(type(first).__name__))
            raise first
        finally:
            del first  # Its traceback holds this frame: the cycle would keep blocks until gc.


def _fails_again(model: PreTrainedModel, device: torch.device, kind: type[Exception]) -> bool:
    try:
        _tried_engine(model, device)
    except _ForwardError as failure:
        return type(failure.__cause__) is kind
    return False


def _tried_engine(model: PreTrainedModel, device: torch.device) -> Engine | registry.Refusal:
    token = model.generation_config.bos_token_id
    ids = torch.tensor([[token if isinstance(token, int) and token >= 0 else 0]], device=device)
    try:
        alone, pool = _try_alone(model, ids)
        if pool is None:
            # In a call from inside a forward, nothing is stored yet.
            return registry.Refusal(Reason.NO_POOL, is_lasting=forward_context.current_forward() is None)
        # Hooks of accelerate move what an offloaded model is given to where its layers run: to one device, if to any.
        begins = device if model.device.type != "meta" else next(iter(pool.groups)).device
        if any(key.device != begins for key in pool.groups):
            return registry.Refusal(Reason.SEVERAL_DEVICES)
        engine = Engine(pool)
        packed = _try_step(model, engine, pool, int(ids))
    except NotPackableError as error:
        return registry.Refusal(error.why, is_lasting=error.why is not Reason.FULL_POOL)
    except OutOfBlocksError:
        return registry.Refusal(Reason.FULL_POOL, is_lasting=False)
    # A row that is packed beside another must not feel it.
    if not torch.allclose(packed, alone, rtol=0.05, atol=float(0.05 * alone.abs().max())):
        return registry.Refusal(Reason.MIXED_ROWS)
    return engine


def _try_alone(model, ids: torch.Tensor) -> tuple[torch.Tensor, KVPool | None]:
    """Logits ``[vocab]`` of one token that goes through an ordinary cache, and the model's pool if it has just one.

    The pool knows the model's attention groups then, and no others: what was stored under another dtype stays behind.
    """
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            alone = functools.partial(model, input_ids=ids, past_key_values=cache, use_cache=True)
            output = _forward(model, alone)
        pools = registry.pools_under(model)
        stored = [layer for layer in cache.layers if isinstance(layer, PagedLayer) and layer.is_paged]
        if len(pools) != 1 or not pools[0].groups or not stored:
            return output.logits[0, -1], None
        if pools[0].groups.keys() == stored[0].batch.groups.keys():
            break
        registry.renew_pools(model, even_good=True)
    return output.logits[0, -1], pools[0]


def _forward(model, run):
    """Call `run`; an error of the model's own is told from all others."""
    try:
        return run()
    except (NotPackableError, OutOfBlocksError):
        raise
    except Exception as error:
        raise _ForwardError(f"the forward of {type(model).__name__} raised {type(error).__name__}") from error


def _try_step(model, engine: Engine, pool: KVPool, token: int) -> torch.Tensor:
    """Logits of a one-token row that runs beside another."""
    scheduler = Scheduler(engine.scheduler.groups, token_budget=8)
    step = -1 if token > 1 else 1  # The other row has other tokens: a mean over equal ones would show nothing.
    others = [token + step, token + 2 * step, token + step]
    requests = [Request(others, engine.block_pools), Request([token], engine.block_pools)]
    undo = Undo(functools.partial(_release, pool, requests))
    try:
        chunks = atomically(functools.partial(_plan_trial, pool, scheduler, requests))
        with pool.lock:
            for group in scheduler.groups:
                group.ensure()
        with torch.inference_mode(False), torch.no_grad():
            windows, storages = zip(*((group.window, group.layers) for group in scheduler.groups))
            step = pack(chunks, windows, storages, StepBuffers(engine.keys[0].device))
            return _forward(model, lambda: run_step(model, step))[1]
    finally:
        undo.now()


def _plan_trial(pool: KVPool, scheduler: Scheduler, requests: list[Request]) -> list[Chunk]:
    with pool.lock:
        for request in requests:
            scheduler.add(request)
        chunks = scheduler.schedule().chunks
    if len(chunks) < len(requests):
        raise NotPackableError(Reason.FULL_POOL)
    return chunks


def _release(pool: KVPool, requests: list[Request]) -> None:
    with pool.lock:
        for request in requests:
            request.release()
