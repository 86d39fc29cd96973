"""Text-generation pipelines of "paged" models: items run together, and results come back in order.

Everything but the forwards stays where it was: the pipeline's own loader reads, preprocesses and collates, and
its own iterators take batches apart and postprocess, in the consumer's thread. Each forward is the pipeline's
own too, and calls `generate`; forwards that run at the same time share the steps of the model's engine.
"""

import collections
import functools
import threading
from collections.abc import Iterator

from transformers import GenerationMixin, TextGenerationPipeline
from transformers.generation import GenerationMode
from transformers.utils import logging

from hf_paged.compat.transformers import (
    complete_generation_config,
    generate_options,
    has_own_forward,
    replace_forwards,
)
from hf_paged.reasons import Reason, Why
from hf_paged.sampling.rng_replay import is_unseeded, no_replay
from hf_paged_integrations.pipelines.prefetch import Arrivals, Prefetch, Reader
from hf_paged_integrations.transformers.eligibility import why_not_packable

logger = logging.get_logger(__name__)

# Prompts that run at the same time. Twice as many are read ahead at most.
WINDOW = 32
# What `generate` takes besides generation parameters. Anything else is an object or a tensor of the caller's, which
# one item after the other may use and change.
_KNOWN_ARGUMENTS = {"tokenizer"}


def iterate(
    original,
    pipe: TextGenerationPipeline,
    inputs,
    num_workers,
    batch_size,
    preprocess_params,
    forward_params,
    postprocess,
):
    """``get_iterator`` of a `TextGenerationPipeline` whose model is "paged"; `original` is transformers' own."""
    why = _why_one_by_one(pipe, forward_params)
    if why is not None:
        logger.info(f"hf_paged: the pipeline's items run one after another, because {why}. Remedy: {why.remedy}.")
        return original(pipe, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess)
    news = threading.Condition()
    is_sized = isinstance(inputs, collections.abc.Sized)
    arrivals = None if is_sized or num_workers else Arrivals(inputs, news)
    source = inputs if arrivals is None else arrivals
    results = original(pipe, source, num_workers, batch_size, preprocess_params, forward_params, postprocess)
    outputs = functools.partial(_Forwards, arrivals=arrivals, may_wait=not is_sized, batch_size=batch_size, news=news)
    replace_forwards(results, outputs)
    return results


class _Forwards:
    """The forwards of a pipeline's batches, which run ahead of whoever takes them."""

    def __init__(self, loader, forward, params: dict, arrivals: Arrivals | None, may_wait: bool, batch_size: int, news):
        self._loader, self._arrivals, self._may_wait, self._news = loader, arrivals, may_wait, news
        self._batch_size, self._function = batch_size, functools.partial(_forward, forward, params)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        batches, reader, items_per_draw = iter(self._loader), None, 1
        if self._arrivals is not None:
            reader, items_per_draw = self._arrivals.reader, self._batch_size
        elif self._may_wait:  # Worker processes read and preprocess; only what they send is waited for.
            batches = reader = Reader(batches, self._news)
        window = max(1, WINDOW // self._batch_size)
        return Prefetch(self._function, batches, reader, items_per_draw, window, self._news)


def _forward(forward, params: dict, batch, cancellation):
    with no_replay():  # Items that sample are here only if torch was never seeded.
        return forward(batch, **{**params, "stopping_criteria": [cancellation]})


def _why_one_by_one(pipe: TextGenerationPipeline, forward_params: dict) -> Why | None:
    """Why items cannot run together with the results of one after another; None if they can."""
    model = pipe.model
    if has_own_forward(pipe):
        return Reason.OWN_FORWARD.of(type(pipe).__name__)
    generate = getattr(model, "generate", None)
    if getattr(generate, "__func__", None) is not GenerationMixin.generate:
        return Reason.OWN_GENERATE.of(type(model).__name__)
    options = {name: value for name, value in forward_params.items() if name != "prefix_length"}
    try:
        options = {name: value for name, value in generate_options(pipe, options).items() if value is not None}
        config, others = complete_generation_config(model, options.pop("generation_config", None), options)
    except Exception as error:  # The pipeline raises it again, where the caller expects it.
        return Reason.WRONG_ARGUMENTS.of(type(error).__name__)
    unknown = sorted(name for name in others if others[name] is not None and name not in _KNOWN_ARGUMENTS)
    if unknown:
        return Reason.SHARED_ARGUMENT.of(unknown[0])
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return Reason.OTHER_MODE.of(config.get_generation_mode().value)
    if config.max_time is not None:
        return Reason.TIME_LIMIT
    if config.do_sample and not is_unseeded():
        return Reason.SEED
    return why_not_packable(model, config)
