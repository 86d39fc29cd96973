"""A small proof that "paged" works here: a tiny random model does dense and paged the same, packed, and together.

It needs no network and no file, and says which part failed. What it changes for its time it puts back.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
)

from hf_paged import exit_report
from hf_paged.compat.transformers import is_attention_registered
from hf_paged.config import PagedConfig
from hf_paged.errors import PagedError
from hf_paged.metrics import Stats, stats
from hf_paged.models import registry

_VOCAB, _ROWS, _PROMPT, _PADS, _NEW = 97, 2, 20, 7, 16
_PROMPTS = ["5 6 7 8 9 10 11", "12 13 14", "15 16 17 18 19"]
_LENGTHS = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False}
_REMEDY = 'load models with attn_implementation="sdpa", or install a transformers that hf_paged was tested with'


class _WatchedPipeline(TextGenerationPipeline):
    """A pipeline that notes, in the thread of its caller, each item that it reads and each result that it takes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.events: list[str] = []

    def preprocess(self, *args, **kwargs):
        self.events.append("read")
        return super().preprocess(*args, **kwargs)

    def postprocess(self, *args, **kwargs):
        self.events.append("taken")
        return super().postprocess(*args, **kwargs)


def check_paged() -> Stats:
    """Generate with a tiny random llama on the CPU, dense and paged: a ragged batch, and a pipeline over a list.

    Needs the hooks in place and installs none, so that they may call it. It takes a second or two, and longer where the
    C++ kernels have to be compiled first. The random state of the CPU is that of before; a thread that draws from it
    meanwhile may draw the same numbers again. No model, pool or count is left behind.

    Returns
    -------
    Stats
        Of the paged batch.

    Raises
    ------
    PagedError
        If the hooks are not in place, or a part fails: says which, and what to do.
    """
    if not is_attention_registered("paged"):
        raise PagedError('"paged" is not registered with transformers: call hf_paged.enable() first')
    with _unaffected_by_caller():
        with _part("a tiny model, dense"):
            model = _tiny_model()
            inputs, pipe = _ragged_batch(), _tiny_pipeline(model)
            tokens, texts = model.generate(**inputs, **_LENGTHS), _texts(pipe)
        try:
            with _part("a tiny batch, paged"):
                model.set_attn_implementation("paged")
                registry.set_config(model, PagedConfig())  # Whatever the environment says.
                counted = _check_batch(model, inputs, tokens)
            with _part("a tiny pipeline over a list, paged"):
                _check_pipeline(pipe, texts)
            with _part("a tiny model's blocks"):
                _check_blocks(model)
        finally:
            registry.forget_pools(model)
            exit_report.forget(model)
    return counted


@contextlib.contextmanager
def _unaffected_by_caller() -> Iterator[None]:
    """Run on the CPU in plain float32, whatever is set: a model may be under construction on "meta" just now."""
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:  # Pipelines set it where it is not set.
        if parallelism is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """Let an error of any kind say which part of the check failed, and what to do."""
    try:
        yield
    except Exception as error:  # Any code of transformers, torch and ours runs in there.
        said = str(error) if isinstance(error, PagedError) else f"{type(error).__name__}: {error}"
        raise PagedError(f"{name}: {said}. Remedy: {_REMEDY}") from error


def _tiny_model() -> Any:  # A model; `generate` is annotated for a protocol that no class is declared to meet.
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    # Its own generator: seeding torch would seed the GPUs as well. Large weights: with the default ones attention is
    # nearly uniform, and a wrong one goes unseen.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4, generator=generator)
            else:
                parameter.fill_(1)
    return model


def _ragged_batch() -> dict[str, torch.Tensor]:
    """Ids and mask ``[_ROWS, _PROMPT]``, padded on the left."""
    ids = torch.randint(3, _VOCAB, (_ROWS, _PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :_PADS] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _tiny_pipeline(model: Any) -> _WatchedPipeline:
    """A pipeline whose texts are token ids."""
    inner = Tokenizer(models.WordLevel({str(number): number for number in range(_VOCAB)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0")
    return _WatchedPipeline(model=model, tokenizer=tokenizer, device="cpu")


def _texts(pipe: _WatchedPipeline) -> list:
    """The results of a pipeline over a list."""
    # A config in place of its arguments: older pipelines warn where these meet their own defaults.
    return pipe(_PROMPTS, generation_config=GenerationConfig(**_LENGTHS, pad_token_id=0))


def _check_batch(model: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> Stats:
    """Generate paged; the tokens ``[_ROWS, positions]`` must be the expected ones, and must come from packed steps."""
    tokens = model.generate(**inputs, **_LENGTHS)
    counted = stats(model)
    if not torch.equal(tokens, expected):
        raise PagedError("its tokens are not those of the dense cache")
    _refuse_detours(counted)
    if counted.packed_calls != 1:
        raise PagedError("its call was not packed, and no reason was counted")
    if not counted.page_reads:
        raise PagedError("it generated without reading any page")
    return counted


def _check_pipeline(pipe: _WatchedPipeline, expected: list) -> None:
    """Run a pipeline over a list, paged: it must read every item before it takes a result, and pack each call."""
    before = stats(pipe.model)
    pipe.events.clear()
    if _texts(pipe) != expected:
        raise PagedError("its texts are not those of the dense cache")
    counted = stats(pipe.model)
    _refuse_detours(counted)
    if counted.pipelines_in_turn:
        raise PagedError(f"its items run one after another, because {', '.join(counted.pipelines_in_turn)}")
    if counted.pipelines_together != 1 or pipe.events[: len(_PROMPTS)] != ["read"] * len(_PROMPTS):
        raise PagedError("its items run one after another, and no reason was counted")
    if counted.packed_calls != before.packed_calls + len(_PROMPTS):
        raise PagedError("some of its calls were not packed, and no reason was counted")


def _refuse_detours(counted: Stats) -> None:
    if counted.fallbacks:
        raise PagedError(f"its rows could not be packed, because {', '.join(counted.fallbacks)}")
    if counted.gathers:
        raise PagedError(f"keys or values were gathered, because {', '.join(counted.gathers)}")


def _check_blocks(model: Any) -> None:
    """Every block must have come back to a pool that is whole."""
    if used := stats(model).used_blocks:
        raise PagedError(f"it left {used} blocks in use after it had generated")
    for pool in registry.pools_under(model):
        pool.check_integrity()
