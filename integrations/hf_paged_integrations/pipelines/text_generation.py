"""Text-generation pipelines of "paged" models: items run together, and results come back in order.

Everything but the forwards stays where it was: the pipeline's own loader reads, preprocesses and collates, and its own
iterators take batches apart and postprocess, in the consumer's thread. Each forward is the pipeline's own, too, and
calls ``generate``; forwards that run at the same time share the steps of the model's engine.
"""

import functools
import threading
import traceback
from collections.abc import Iterator, Sized

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, TextGenerationPipeline
from transformers.generation import GenerationMode

from hf_paged.compat.transformers import (
    complete_generation_config,
    generate_options,
    has_own_forward,
    replace_forwards,
)
from hf_paged.execution.home_stream import catch_up
from hf_paged.models import registry
from hf_paged.models.placement import devices_of
from hf_paged.models.registry import CallCounts
from hf_paged.reasons import Reason, Why, count_and_log
from hf_paged.sampling.cancellation import Cancellation
from hf_paged.sampling.rng_replay import is_unseeded, no_replay
from hf_paged_integrations.pipelines.prefetch import Prefetch
from hf_paged_integrations.pipelines.reader import Reader, ReadInThread
from hf_paged_integrations.transformers.eligibility import start_device, why_not_packable

# Prompts that run at the same time. Twice as many are read ahead at most.
WINDOW = 32
# Arguments of `generate` that items may share, besides generation parameters. Any other one is an object or a tensor of
# the caller's, which one item after the other may use and change.
_SHARED_ARGUMENTS = {"tokenizer"}


def iterate(
    original,
    pipe: TextGenerationPipeline,
    inputs,
    num_workers: int,
    batch_size: int,
    preprocess_params: dict,
    forward_params: dict,
    postprocess_params: dict,
) -> Iterator:
    """Iterate over a pipeline's results as ``TextGenerationPipeline.get_iterator`` does; its forwards run together.

    Parameters
    ----------
    original : callable
        transformers' own ``get_iterator``.
    pipe : TextGenerationPipeline
        Of a "paged" model.
    inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
        As for `original`. `inputs` that have a length are read as they are needed; others are read in a thread.
    """
    params = (preprocess_params, forward_params, postprocess_params)
    why, counts = _why_one_by_one(pipe, forward_params), registry.counts_of(pipe.model)
    if why is not None:
        count_and_log(counts.pipelines_in_turn, why, "a pipeline's items run one after another")
        return original(pipe, inputs, num_workers, batch_size, *params)
    catch_up(*devices_of(pipe.model, pipe.device))  # Items run in threads of their own.
    wakeup = threading.Condition()
    is_sized = isinstance(inputs, Sized)
    read = None if is_sized or num_workers else ReadInThread(inputs, wakeup)
    results = original(pipe, inputs if read is None else read, num_workers, batch_size, *params)
    outputs = functools.partial(
        _Forwards, read=read, may_wait=not is_sized, batch_size=batch_size, wakeup=wakeup, counts=counts
    )
    replace_forwards(results, outputs)
    return results


class _Forwards:
    """The outputs of a pipeline's forwards, which run ahead of the consumer.

    Parameters
    ----------
    loader : iterable
        Batches.
    forward : callable
        transformers' own, called with a batch and `params`.
    read : ReadInThread or None
        The pipeline's inputs, if a thread reads them.
    may_wait : bool
        The inputs have no length: they may keep the loader waiting.
    batch_size : int
    wakeup : threading.Condition
    counts : CallCounts
        Of the pipeline's model. A run is counted when its first result is asked for.
    """

    def __init__(
        self,
        loader,
        forward,
        params: dict,
        read: ReadInThread | None,
        may_wait: bool,
        batch_size: int,
        wakeup: threading.Condition,
        counts: CallCounts,
    ):
        self._loader, self._read, self._may_wait = loader, read, may_wait
        self._batch_size, self._wakeup, self._counts = batch_size, wakeup, counts
        self._function = functools.partial(_forward, forward, params)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        self._counts.pipelines_together += 1
        batches: Iterator = iter(self._loader)
        reader, items_per_batch = None, 1
        if self._read is not None:
            reader, items_per_batch = self._read.reader, self._batch_size
        elif self._may_wait:  # Worker processes read and preprocess; only what they send is waited for.
            batches = reader = Reader(batches, self._wakeup)
        window = max(1, WINDOW // self._batch_size)
        return Prefetch(self._function, batches, reader, items_per_batch, window, self._wakeup)


def _forward(forward, params: dict, batch, cancellation: Cancellation):
    with no_replay():  # Items that sample are here only if torch was never seeded.
        return forward(batch, **{**params, "stopping_criteria": [cancellation]})


def _why_one_by_one(pipe: TextGenerationPipeline, forward_params: dict) -> Why | None:
    """Why items cannot run together with the results of one after another; None if they can."""
    model = pipe.model
    if has_own_forward(pipe):
        return Reason.OWN_FORWARD.of(type(pipe).__name__)
    generate = getattr(model, "generate", None)
    if not isinstance(model, GenerationMixin) or getattr(generate, "__func__", None) is not GenerationMixin.generate:
        return Reason.OWN_GENERATE.of(type(model).__name__)
    try:
        options = _options(pipe, forward_params)
        config, arguments = complete_generation_config(model, options.pop("generation_config", None), options)
    except Exception as error:
        if _is_raised_by_us(error):
            return Reason.OTHER_PREPARATION.of(type(error).__name__)
        return Reason.WRONG_ARGUMENTS.of(type(error).__name__)  # The pipeline raises it again, where it is expected.
    return _why_not_these_arguments(arguments) or _why_not_this_config(model, config)


def _is_raised_by_us(error: Exception) -> bool:
    """Tell whether hf_paged asked for a private name that is gone, or called a function that takes other arguments.

    No code of transformers has run then: torch's modules look their attributes up. A wrong argument of the caller is
    refused by code of transformers, or of the model.
    """
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return {module.partition(".")[0] for module in modules} <= {"hf_paged", "hf_paged_integrations", "torch"}


def _options(pipe: TextGenerationPipeline, forward_params: dict) -> dict:
    """Return the arguments that ``generate`` will get besides a batch and its lengths."""
    params = {name: value for name, value in forward_params.items() if name != "prefix_length"}
    return {name: value for name, value in generate_options(pipe, params).items() if value is not None}


def _why_not_these_arguments(arguments: dict) -> Why | None:
    others = sorted(name for name, value in arguments.items() if value is not None and name not in _SHARED_ARGUMENTS)
    return Reason.SHARED_ARGUMENT.of(others[0]) if others else None


def _why_not_this_config(model: PreTrainedModel, config: GenerationConfig) -> Why | None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return Reason.OTHER_MODE.of(mode.value)
    if config.max_time is not None:
        return Reason.TIME_LIMIT
    if config.do_sample and not is_unseeded(start_device(model, torch.device("cpu"))):
        return Reason.SEED
    return why_not_packable(model, config)
