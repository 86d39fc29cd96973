"""``generate``'s decoding loop for "paged" models: packed rows on the engine, or the original loop and why."""

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from hf_paged import binding
from hf_paged.adopt import why_not_adopt
from hf_paged.call import ROW_WISE, ROW_WISE_CRITERIA, Call
from hf_paged.cancellation import Cancellation
from hf_paged.engine import Engine
from hf_paged.errors import OutOfBlocksError, UnsupportedError
from hf_paged.kv_pool import KVPool
from hf_paged.layer import PagedLayerMixin
from hf_paged.packed import NotPackableError, pack, run_step
from hf_paged.padding import Padding, is_binary
from hf_paged.request import Request
from hf_paged.row_streamer import RowStreamer
from hf_paged.scheduler import Chunk, Schedule, Scheduler
from hf_paged.step_buffers import StepBuffers

from .rectangle import run_rectangle

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
    reason = _why_not_this_call(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
    )
    engine = None
    if reason is None:
        engine = binding.engine_of(model, lambda model: _make_engine(model, _device_of(model, input_ids)))
        reason = engine if isinstance(engine, str) else None
    if reason is None and _outlives_call(model_kwargs["past_key_values"], generation_config):
        reason = why_not_adopt(model_kwargs["past_key_values"], engine.pool)
    if reason is None:
        mask = model_kwargs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        cache = model_kwargs["past_key_values"]
        call = Call(
            *(input_ids, valid, logits_processor, stopping_criteria, generation_config, streamer, engine.block_pools),
            cache=cache if _outlives_call(cache, generation_config) else None,
        )
        try:
            sequences = engine.run(model, call)
            engine.pool.packed_calls += 1
            if not generation_config.return_dict_in_generate:
                return sequences
            return GenerateDecoderOnlyOutput(
                sequences=sequences, scores=call.scores, logits=call.logits, past_key_values=cache
            )
        except NotPackableError as error:
            # The model was changed since its engine was made, say to return attentions.
            if call.has_begun:
                raise UnsupportedError(
                    f"{type(model).__name__} was changed while it generated: {error}. Call generate again"
                ) from error
            reason = str(error)
    output = run_rectangle(
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
    for pool in binding.pools_under(model)[:1]:
        pool.fallbacks[reason] += 1
    return output


def why_not_packable(model: PreTrainedModel, config: GenerationConfig) -> str | None:
    """Why no call with this config runs packed, whatever its inputs; None if calls may.

    Parameters
    ----------
    config : GenerationConfig
        Complete, as ``_prepare_generation_config`` returns it.
    """
    if not config.use_cache or config.cache_implementation is not None:
        return "no cache, or not transformers' DynamicCache"
    if config.guidance_scale not in (None, 1) or config.watermarking_config is not None:
        return "a processor that may look at other rows"
    no_ids = torch.empty(1, 0)
    no_ids = no_ids.to(_device_of(model, no_ids))
    return _why_not_this_model(model, no_ids.device) or _why_not_these_options(config, no_ids, False, None)


def _why_not_this_call(model, ids, processors, criteria, config, synced_gpus, streamer, kwargs) -> str | None:
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


def _why_not_this_model(model, device: torch.device) -> str | None:
    if model.training or torch.is_autocast_enabled(device.type):
        return "training or autocast"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder"
    for method in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill"):
        # Asked of the model itself: PEFT gives one to the instance, for the time of a call.
        if getattr(getattr(model, method), "__func__", None) is not getattr(GenerationMixin, method):
            return f"the model has a {method} of its own"
    if not model._supports_logits_to_keep():
        return "the model computes every logit"
    if any(_is_of_peft(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        return "adapters chosen row by row"
    text = model.config.get_text_config(decoder=True)
    ropes = [getattr(text, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    if any(rope.get("rope_type") in _ROPE_OF_THE_FORWARD for rope in ropes):
        return "frequencies that depend on the whole forward"
    return None


def _is_of_peft(hook) -> bool:
    """Whether PEFT made a hook: for the time of a call, they tell its layers something for each row of the batch."""
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("peft.")


def _why_not_these_inputs(ids: torch.Tensor, kwargs: dict) -> str | None:
    extra = [name for name in kwargs.keys() - _MODEL_ARGUMENTS if kwargs[name] is not None]
    if extra:
        return f"model inputs besides tokens: {', '.join(sorted(extra))}"
    if "update" in vars(DynamicCache):
        return "another library has changed DynamicCache.update"
    cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache or not kwargs.get("use_cache"):
        return "no cache, or not transformers' DynamicCache"
    if not all(isinstance(layer, PagedLayerMixin) and not layer.is_dense for layer in cache.layers) or not cache.layers:
        return "recurrent or other layers that are not paged"
    if cache.get_seq_length():
        return "a cache that holds tokens already"
    if ids.shape[1] == 0:
        return "an empty prompt"
    mask = kwargs.get("attention_mask")
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if mask is not None:
        if mask.shape != ids.shape or not Padding(mask.bool()).left or not bool(mask[:, -1].all()):
            return "padding that is not on the left"
        if not is_binary(mask):
            return "an attention mask with values other than 0 and 1"
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    given = kwargs.get("position_ids")
    if given is not None and not _same_where(given, positions, mask):
        return "positions of the caller's own"
    return None


def _outlives_call(cache: DynamicCache, config) -> bool:
    """Whether the caller will see what the call leaves in its cache."""
    return bool(config.return_dict_in_generate or getattr(cache, "_is_user_defined", False))


def _same_where(given: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if given.dim() != 2 or given.shape not in (expected.shape, expected[:1].shape):
        return False
    differs = given.to(expected.device) != expected
    return not bool(differs.any() if mask is None else (differs & mask.bool()).any())


def _why_not_these_options(config, ids: torch.Tensor, synced_gpus: bool, streamer) -> str | None:
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "returned attentions or hidden states"
    if synced_gpus or config.is_assistant or config.compile_config is not None:
        return "synced_gpus, an assistant or a compiled forward"
    if streamer is not None and len(ids) > 1 and not isinstance(streamer, RowStreamer):
        return "a streamer for several rows"
    if config.do_sample and ids.device.type != "cpu":
        return "sampling on a device whose random numbers are not drawn row by row"
    return None


def _why_not_this_cache(ids: torch.Tensor, config, kwargs: dict) -> str | None:
    """Of several rows dense returns a rectangle, with pads and with what finished rows went on to store."""
    if not _outlives_call(kwargs["past_key_values"], config):
        return None
    mask = kwargs.get("attention_mask")
    if len(ids) > 1 or not (mask is None or bool(mask.all())):
        return "a returned cache, or returned scores, of several or padded rows"
    return None


def _why_not_these_hooks(processors, criteria) -> str | None:
    unknown = [type(processor).__name__ for processor in processors if type(processor) not in ROW_WISE]
    if unknown:
        return f"a processor that may look at other rows: {unknown[0]}"
    kinds = {type(criterion) for criterion in criteria}
    if unknown := sorted(kind.__name__ for kind in kinds - ROW_WISE_CRITERIA):
        return f"a criterion that may look at other rows: {unknown[0]}"
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria) and len(kinds - {Cancellation}) > 1:
        return "rows that go on after they are finished"
    return None


def _make_engine(model: PreTrainedModel, device: torch.device) -> Engine | str:
    """The engine of a model, or why it can have none: found out with two tiny forwards.

    They run uncompiled, whatever the user compiled: what they check is not checked again in compiled steps.
    """
    # The stance is the process's: `engine_of` lets one thread at a time come here.
    with torch.compiler.set_stance("force_eager"):
        return _tried_engine(model, device)


def _tried_engine(model: PreTrainedModel, device: torch.device) -> Engine | str:
    token = model.generation_config.bos_token_id
    ids = torch.tensor([[token if isinstance(token, int) and token >= 0 else 0]], device=device)
    with torch.no_grad():
        # One token through an ordinary cache makes the pool, in the shape of the model's states.
        alone = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits[0, -1]
    pools = binding.pools_under(model)
    if len(pools) != 1 or not pools[0].groups:
        return "no pool of its own, or several"
    # Hooks of accelerate move what an offloaded model is given to where its layers run: to one device, if to any.
    begins = device if model.device.type != "meta" else next(iter(pools[0].groups)).device
    if any(key.device != begins for key in pools[0].groups):
        return "layers on several devices"
    engine = Engine(pools[0])
    try:
        packed = _try_step(model, engine, pools[0], int(ids))
    except (NotPackableError, OutOfBlocksError) as error:
        return str(error)
    except Exception as error:  # Whatever a model makes of masks and caches that it does not expect.
        return f"a packed step fails in this model ({type(error).__name__})"
    # A row that is packed beside another must not feel it.
    if not torch.allclose(packed, alone, rtol=0.05, atol=float(0.05 * alone.abs().max())):
        return "the model mixes the rows of a packed forward"
    return engine


def _try_step(model, engine: Engine, pool: KVPool, token: int) -> torch.Tensor:
    """Logits of a one-token row that runs beside another."""
    scheduler = Scheduler(engine.scheduler.groups, token_budget=8)
    requests = [Request([token, token, token], engine.block_pools), Request([token], engine.block_pools)]
    with pool.lock:
        try:
            for request in requests:
                scheduler.add(request)
            schedule: Schedule = scheduler.schedule()
            chunks: list[Chunk] = schedule.chunks
            if len(chunks) < len(requests):
                raise NotPackableError("the pool has no room for two rows")
            groups = scheduler.groups
            for group in groups:
                for storage in group.layers.values():
                    storage.ensure(group.blocks.high_water)
            with torch.inference_mode(False), torch.no_grad():
                windows, storages = [group.window for group in groups], [group.layers for group in groups]
                return run_step(model, pack(chunks, windows, storages, StepBuffers(engine.keys[0].device)))[1]
        finally:
            for request in requests:
                request.release()
