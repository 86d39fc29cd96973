"""The models of a run: one model several times, with the same weights and different attention."""

import contextlib
import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_paged
from hf_paged import PagedError
from hf_paged.cli import demo_model
from hf_paged.generation.engine import Engine
from hf_paged.memory.kv_format import KV_FORMATS
from hf_paged.models import registry
from hf_paged_evals.models import qwen_shaped
from hf_paged_evals.models.kv_rounding import round_kv
from hf_paged_evals.runner.options import Options

SMOLLM2, QWEN_SHAPED = "smollm2", "smollm2-qwen"


@dataclass
class Counts:
    """Counters of a model's pool; JSON-able by ``vars``."""

    page_reads: int = 0
    packed_calls: int = 0
    preemptions: int = 0
    gathers: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)


class ModelPair:
    """Tokenizer, baseline and backend of a run, each loaded when it is first asked for.

    Parameters
    ----------
    options : Options

    Attributes
    ----------
    tokenizer : PreTrainedTokenizerBase
        Pads on the left.
    baseline, backend : PreTrainedModel
        Share their weights. The backend is paged as the options say.
    prepacked : PreTrainedModel
        The backend with prepacked weights: a second copy of those of its linear layers.
    exact : PreTrainedModel
        The baseline in float64: the judge of near-ties and of the errors of both.
    """

    def __init__(self, options: Options):
        self.options = options
        self.device = PartialState().device  # Of this process, as the runner set it up.

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.options)

    @functools.cached_property
    def baseline(self) -> PreTrainedModel:
        return load_model(self.options, self.options.baseline).to(self.device)

    @functools.cached_property
    def backend(self) -> PreTrainedModel:
        return self.paged_as()

    @functools.cached_property
    def prepacked(self) -> PreTrainedModel:
        return self.paged_as(prepack_weights=True)

    @functools.cached_property
    def exact(self) -> PreTrainedModel:
        model = copy.deepcopy(self.baseline).double()
        model.set_experts_implementation("eager")  # The grouped products of experts know no float64.
        return model

    def paged_as(self, **config) -> PreTrainedModel:
        """Another backend, which shares the baseline's weights; these fields of its `PagedConfig` differ."""
        model = _sharing_tensors(self.baseline)
        model.set_attn_implementation(self.options.backend)
        if self.options.backend == "paged":
            hf_paged.configure(model, dataclasses.replace(self.options.paged_config(), **config))
        if self.options.kv_dtype is not None and self.options.kv_dtype not in KV_FORMATS:
            round_kv(model, self.options.kv_dtype)
        return model

    def release(self) -> None:
        """Let go of the pools of all paged models, and of the prefixes that they store."""
        hf_paged.release(self.backend)
        if "prepacked" in self.__dict__:
            hf_paged.release(self.prepacked)

    @contextlib.contextmanager
    def counting(self, model: PreTrainedModel | None = None) -> Iterator[Counts]:
        """Count the work of a model's pool while this is open; nothing may release the pool meanwhile.

        Parameters
        ----------
        model : PreTrainedModel or None
            None: the backend.
        """
        model = self.backend if model is None else model
        before, counts = _counts(model), Counts()
        yield counts
        for name, value in vars(_counts(model)).items():
            earlier = getattr(before, name)
            grown = dict(Counter(value) - Counter(earlier)) if isinstance(value, dict) else value - earlier
            setattr(counts, name, grown)


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The tokenizer alone: making samples needs no model.

    Raises
    ------
    PagedError
        If there is no such model here.
    """
    return _tokenizer(options.model)


@functools.lru_cache(maxsize=1)  # Every task makes its samples with it, and a GGUF file takes seconds to read.
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    if model in (SMOLLM2, QWEN_SHAPED):
        return demo_model.load_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except OSError as error:
        raise PagedError(f"transformers cannot load a tokenizer of {model!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(options: Options, implementation: str) -> PreTrainedModel:
    """The model of a run, on the CPU, with weights of its own.

    Parameters
    ----------
    implementation : str
        Of its attention, such as ``"sdpa"`` or ``"paged"``.
    """
    dtype = getattr(torch, options.dtype)
    if options.model == SMOLLM2:
        return demo_model.load_model(implementation, dtype)
    if options.model == QWEN_SHAPED:
        return qwen_shaped.load_model(implementation, dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=implementation).eval()


def name_of(options: Options) -> str:
    """The model as a report names it."""
    names = {SMOLLM2: "SmolLM2-135M-Instruct", QWEN_SHAPED: "SmolLM2-135M-Instruct as a Qwen2 with outlier keys"}
    return names.get(options.model) or Path(options.model).name


def _sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _counts(model: PreTrainedModel) -> Counts:
    stats = hf_paged.stats(model)
    engines = [user for pool in registry.pools_under(model) for user in pool.caches if isinstance(user, Engine)]
    preemptions = sum(engine.scheduler.num_preemptions for engine in engines)
    return Counts(stats.page_reads, stats.packed_calls, preemptions, stats.gathers, stats.fallbacks)


def quiet() -> None:
    """Leave the terminal to the progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
