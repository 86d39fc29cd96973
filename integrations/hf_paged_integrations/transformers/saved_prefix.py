"""`save_prefix` and `load_prefix`: the beginning of prompts in a file, for processes to come."""

import os
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_paged.errors import SavedPrefixError, UnsupportedError
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.generation import saved_prefix
from hf_paged.generation.engine import Engine
from hf_paged.models import registry
from hf_paged.models.placement import devices_of
from hf_paged.models.refusal import Refusal
from hf_paged_integrations.transformers.eligibility import start_device, why_not_packable
from hf_paged_integrations.transformers.generate import engine_for

_ATTEMPTS = 3  # Calls beside this one may evict blocks before they are read.


def save_prefix(model: torch.nn.Module, path: str | os.PathLike, input_ids: torch.Tensor | Sequence[int]) -> int:
    """Save the keys and values of a prompt's beginning, such as a long system prompt, for `load_prefix`.

    Runs the prompt if its blocks are not cached. Full blocks are saved, the rest of the tokens is left out. The file is
    of safetensors, with a JSON header; it is written beside `path` and takes its place when it is complete.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded with ``attn_implementation="paged"``; or what wraps one, as PEFT does.
    path : str or path
        A file, readable for the user alone: the tokens can be read from it.
    input_ids : torch.Tensor or sequence of int
        ``[tokens]`` or ``[1, tokens]``, without pads: exactly what later prompts begin with.

    Returns
    -------
    int
        Tokens that were saved, a multiple of ``PagedConfig.block_size``.

    Raises
    ------
    UnsupportedError
        If the calls of the model cannot run packed, or its prefix cache is off or out of use.
    SavedPrefixError
        If the tokens fill no block or are not the model's, the blocks are evicted too soon, or the file cannot be
        written. What was at `path` is as before.
    OutOfBlocksError
        If the pool cannot hold the prompt.
    """
    model, path = _decoder_of(model), os.fspath(path)
    tokens = _tokens_of(input_ids)
    if why := saved_prefix.unknown_token(model, tokens):
        raise SavedPrefixError(f"the prefix cannot be saved: {why}")
    device = start_device(model, torch.device("cpu"))
    with on_home_stream(*devices_of(model, device)):
        engine = _engine_of(model, device)
        size = engine.pool.config.block_size
        if len(tokens) < size:
            raise SavedPrefixError(
                f"the prefix has {len(tokens)} tokens, and full blocks of {size} are saved: save a longer prefix, or "
                "set a smaller block_size with hf_paged.configure"
            )
        del tokens[len(tokens) // size * size :]
        for _ in range(_ATTEMPTS):
            if saved_prefix.save(engine, model, path, tokens):
                return len(tokens)
            _run(model, tokens, device)
            engine = _engine_of(model, device)  # Another one if the model was changed.
        if saved_prefix.save(engine, model, path, tokens):
            return len(tokens)
    raise SavedPrefixError(
        f"the blocks of the prefix were evicted before they could be read, {_ATTEMPTS} times: save it while fewer "
        "calls run, or raise memory_budget with hf_paged.configure"
    )


def load_prefix(model: torch.nn.Module, path: str | os.PathLike) -> int:
    """Load what `save_prefix` has saved: prompts that begin with these tokens find them, from the next call on.

    The blocks are cached, as those of finished rows are: they are evicted in their turn, and dropped when the model is
    changed. The file is checked before anything is changed: that it is whole and not altered; that the model, the
    content of its weights, its settings, dtypes and block size, and the cache salt are those that it was saved with. It
    holds numbers alone, no code. Still, who may write it decides what the model reads: keep it as you keep weights.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded with ``attn_implementation="paged"``; or what wraps one, as PEFT does.
    path : str or path

    Returns
    -------
    int
        Tokens that can be found.

    Raises
    ------
    SavedPrefixError
        If the file is refused. Nothing was changed.
    OutOfBlocksError
        If the pool has too few blocks, or may cache too few of them. Nothing was changed.
    UnsupportedError
        If the calls of the model cannot run packed, or its prefix cache is off or out of use.
    OSError
        If the file cannot be opened: `FileNotFoundError` where there is none.

    Examples
    --------
    >>> hf_paged.save_prefix(model, "system.safetensors", ids)  # doctest: +SKIP
    >>> hf_paged.load_prefix(model, "system.safetensors")  # in another process  # doctest: +SKIP
    """
    model, path = _decoder_of(model), os.fspath(path)
    device = start_device(model, torch.device("cpu"))
    with on_home_stream(*devices_of(model, device)):
        return saved_prefix.load(_engine_of(model, device), model, path)


def _decoder_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model that generates, inside what wraps it."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}: pass the model itself, such as pipe.model")
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return module
    raise UnsupportedError(f"{type(model).__name__} has no model inside that generates: pass one that does")


def _tokens_of(input_ids: torch.Tensor | Sequence[int]) -> list[int]:
    ids = torch.as_tensor(input_ids)
    if ids.dtype not in (torch.int32, torch.int64) or not (ids.dim() == 1 or ids.dim() == 2 and len(ids) == 1):
        raise SavedPrefixError(
            f"input_ids are {ids.dtype} of shape {list(ids.shape)}, and integers of shape [tokens] or [1, tokens] are "
            "expected: pass the tokens of one prompt, such as tokenizer(text).input_ids"
        )
    return ids.flatten().tolist()


def _engine_of(model: PreTrainedModel, device: torch.device) -> Engine:
    """The engine of a model, made if it has none yet.

    Raises
    ------
    UnsupportedError
        If it can have none.
    """
    if registry.implementation_of(model) != "paged":
        raise UnsupportedError(
            f"prefixes are of models in pages, and this one attends with {registry.implementation_of(model)!r}: load "
            'it with attn_implementation="paged"'
        )
    why = why_not_packable(model, GenerationConfig(use_cache=True, do_sample=False))
    engine = engine_for(model, device) if why is None else Refusal(why)
    if isinstance(engine, Refusal):
        raise UnsupportedError(
            "prefixes are saved and loaded for models whose calls run packed, and this one's do not, because "
            f"{engine.why.text}. Remedy: {engine.why.remedy}"
        )
    return engine


def _run(model: PreTrainedModel, tokens: list[int], device: torch.device) -> None:
    """Run a prompt, so that its blocks are cached."""
    ids = torch.tensor([tokens], device=device)
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
