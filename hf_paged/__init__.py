"""hf_paged: a paged KV cache for Transformers behind ``attn_implementation="paged"``.

Importing the package registers the implementation:

>>> import hf_paged
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="paged")  # doctest: +SKIP
>>> model.generate(**inputs)  # doctest: +SKIP
"""

from hf_paged.compat.requirements import check_transformers

check_transformers()  # Before the modules that an unsuitable transformers would fail to import, without a sentence.

import torch

from hf_paged import exit_report
from hf_paged.config import PagedConfig
from hf_paged.errors import BlockError, OutOfBlocksError, PagedError, SavedPrefixError, UnsupportedError
from hf_paged.metrics import Stats, stats
from hf_paged.models import registry
from hf_paged.sampling.cancellation import Cancellation
from hf_paged.scheduling.cache_salt import cache_salt
from hf_paged_integrations.serving.async_engine import AsyncEngine, EngineClosedError, QueueFullError
from hf_paged_integrations.serving.streaming import BatchTextIteratorStreamer
from hf_paged_integrations.transformers.hooks import disable, enable, is_enabled
from hf_paged_integrations.transformers.saved_prefix import load_prefix, save_prefix

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine",
    "BatchTextIteratorStreamer",
    "BlockError",
    "Cancellation",
    "EngineClosedError",
    "OutOfBlocksError",
    "PagedConfig",
    "PagedError",
    "QueueFullError",
    "SavedPrefixError",
    "Stats",
    "UnsupportedError",
    "cache_salt",
    "configure",
    "disable",
    "enable",
    "is_enabled",
    "load_prefix",
    "release",
    "save_prefix",
    "stats",
]


def configure(model: torch.nn.Module, config: PagedConfig) -> None:
    """Page `model`'s cache as `config` says, from the next cache on.

    The pool the model has is let go of, as by `release`.

    Parameters
    ----------
    model : PreTrainedModel
    config : PagedConfig

    Raises
    ------
    TypeError
        If `config` is no `PagedConfig`.
    """
    if not isinstance(config, PagedConfig):
        raise TypeError(
            f"configure takes a PagedConfig, got {type(config).__name__}: hf_paged.PagedConfig(block_size=16)"
        )
    registry.set_config(model, config)
    registry.forget_pools(model)


def release(model: torch.nn.Module) -> None:
    """Give the memory of `model`'s pool back to the system; its statistics start anew.

    Caches that are alive stay good: they keep the old pool until they die. The next cache makes a new one.
    """
    registry.forget_pools(model)


enable()
exit_report.install()
