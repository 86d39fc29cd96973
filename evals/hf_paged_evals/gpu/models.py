"""Models of known shapes with random weights: how fast a step is depends on no weight's value."""

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_paged
from hf_paged_evals.gpu.context import Context

_TOKEN_BUDGET = 4096  # Where the library has one default for all devices, which is one for CPUs.


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes
    ----------
    name : str
        As reports say it.
    hidden, intermediate, layers, num_heads, num_kv_heads, dim, vocab : int
    is_tied : bool
        The output layer multiplies with the input embeddings.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    num_heads: int
    num_kv_heads: int
    dim: int
    vocab: int
    is_tied: bool

    @property
    def kv_bytes_a_token(self) -> int:
        """Of bfloat16 keys and values, in all layers."""
        return 2 * 2 * self.layers * self.num_kv_heads * self.dim


LLAMA_8B = Shape("Llama 8B shape", 4096, 14336, 32, 32, 8, 128, 128256, is_tied=False)
LLAMA_1B = Shape("Llama 1B shape", 2048, 8192, 16, 32, 8, 64, 128256, is_tied=True)
TINY = Shape("tiny shape", 64, 64, 2, 4, 2, 16, 97, is_tied=False)


def llama(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, spread: float = 0.02):
    """A Llama of that shape on the device, with attention "sdpa".

    Parameters
    ----------
    spread : float
        Standard deviation of its weights.
    """
    return from_config(
        "llama", device, dtype, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.dim, vocab_size=shape.vocab, tie_word_embeddings=shape.is_tied, initializer_range=spread,
        max_position_embeddings=131072,
    )  # fmt: skip


def from_config(
    model_type: str, device: torch.device, dtype: torch.dtype, implementation: str = "sdpa", **fields
) -> PreTrainedModel:
    """A model of that type on the device, with random weights that depend on nothing else. No token ends a row."""
    config = AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=None, **fields)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    return model.eval()


def read_weights(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but the input embeddings, unless they are the output's too."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if inputs is outputs else total - inputs.nbytes


def prompts(context: Context, shape: Shape, rows: int, tokens: int) -> torch.Tensor:
    """Random prompts ``[rows, tokens]``, no two alike; those of fewer rows are the first of those of more."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, min(shape.vocab, 32000), (rows, tokens), generator=generator).to(context.device)


def page(model: PreTrainedModel, **fields) -> None:
    """Switch a model to "paged" with a new pool, configured by `fields` and else as the library does by default."""
    if isinstance(hf_paged.PagedConfig().token_budget, int):
        fields.setdefault("token_budget", _TOKEN_BUDGET)
    model.set_attn_implementation("paged")
    hf_paged.configure(model, hf_paged.PagedConfig(**fields))


def capture_modes(context: Context) -> Iterator[tuple[str, dict]]:
    """Names of the ways to run a decode step, and the fields of `PagedConfig` that ask for them."""
    if not has_capture():
        context.refuse("captured steps", "this hf_paged has no PagedConfig(capture=...)")
        yield "paged eager", {}
        return
    yield "paged captured", {"capture": "auto" if context.device.type == "cuda" else "ops"}
    yield "paged eager", {"capture": "off"}


def has_capture() -> bool:
    """Tell whether this hf_paged captures steps."""
    return "capture" in {field.name for field in dataclasses.fields(hf_paged.PagedConfig)}


def counters(model: PreTrainedModel) -> dict:
    """The statistics of a model's pool that say which way its calls took; those that are zero or empty are left out."""
    found = dataclasses.asdict(hf_paged.stats(model))
    blocks = ("total_blocks", "used_blocks", "cached_blocks", "free_blocks", "block_size", "tokens_stored", "waste")
    return {name: value for name, value in found.items() if value and name not in blocks}


def forget(model: PreTrainedModel) -> None:
    """Switch a model to dense, and give its pool's memory back."""
    hf_paged.release(model)
    model.set_attn_implementation("sdpa")
    gc.collect()
