"""``hf-paged build --model`` and ``--heads``: Triton kernels of attention layers, compiled before they are needed."""

import importlib.util
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from hf_paged.cli.plan.footprint import LayerStates, footprint
from hf_paged.errors import PagedError
from hf_paged_kernels.triton.launch_plan import Device, describe

if TYPE_CHECKING:
    from hf_paged_kernels.triton.ahead import AttentionLayer

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}  # By the names of `PagedConfig.kv_dtype`.


def build_gpu_kernels(layers: list["AttentionLayer"], target: str | None, num_processes: int | None) -> str:
    """Compile the kernels of these layers into Triton's cache; says what was compiled.

    Parameters
    ----------
    target : str or None
        An architecture, such as "sm90"; None: that of the GPU here.
    num_processes : int or None
        That compile at the same time; None: one per core.

    Raises
    ------
    PagedError
        If there is no GPU here and none was named, or a kernel does not compile.
    ValueError
        If there are no kernels for the target.
    """
    import triton

    from hf_paged_kernels.triton.ahead import compile_layers, gpu_target

    if target is None and not torch.cuda.is_available():
        raise PagedError("there is no GPU here to compile for: name one with --target, such as --target sm90")
    device = describe(torch.device("cuda", 0)) if target is None else Device(target, processors=1)
    gpu_target(device)  # Raises before anything is compiled.
    compiled, failures = compile_layers(layers, device, num_processes)
    if failures:
        raise PagedError(f"{len(failures)} Triton kernels do not compile for {device.arch}; the first: {failures[0]}")
    return f"{compiled} Triton kernels for {device.arch} in {triton.knobs.cache.dir}"


def model_layers(
    config: PreTrainedConfig, dtype: torch.dtype, block_size: int, codes: torch.dtype | None = None
) -> list["AttentionLayer"]:
    """The different attention layers of a model, by its config.

    Parameters
    ----------
    codes : torch.dtype, optional
        Of quantised pages, which layers with a sliding window have not.

    Raises
    ------
    PagedError
        If its cache cannot be planned, or its config does not tell how many heads there are.
    """
    check_triton()
    from hf_paged_kernels.triton.ahead import AttentionLayer

    text, found = config.get_text_config(decoder=True), footprint(config, dtype)
    num_heads = getattr(text, "num_attention_heads", None)
    has_softcap = getattr(text, "attn_logit_softcapping", None) is not None
    layers = []
    for group in found.groups:
        for states in dict.fromkeys(group.layers):
            if not isinstance(num_heads, int) or num_heads % states.num_kv_heads:
                raise PagedError(
                    f"the config of {found.model_type} has {num_heads} attention heads for {states.num_kv_heads} KV "
                    "heads, which the kernels do not serve: name the heads of a layer with --heads"
                )
            sizes = (num_heads, states.num_kv_heads, states.key_dim, states.value_dim, block_size)
            if _are_latents(states, text):
                key_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
                layers.append(AttentionLayer(*sizes, dtype, group.window, expanded_dim=key_dim))
                # Rows that begin attend to the expanded keys and values of a step, whose blocks are single tokens.
                layers.append(AttentionLayer(num_heads, num_heads, key_dim, text.v_head_dim, 1, dtype, group.window))
            else:
                of_pages = codes if group.window is None else None
                layers.append(
                    AttentionLayer(*sizes, dtype, group.window, has_softcap, found.sinks_dtype, codes=of_pages)
                )
    return layers


def _are_latents(states: LayerStates, config: PreTrainedConfig) -> bool:
    """Tell whether a layer caches latents and their rope parts, which its attention absorbs."""
    sizes = (getattr(config, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (states.num_kv_heads, states.key_dim, states.value_dim) == (1, *sizes)


def layer_of_heads(
    heads: str, dtype: torch.dtype, block_size: int, codes: torch.dtype | None = None
) -> "AttentionLayer":
    """The layer that ``--heads`` names: query heads, KV heads and their size, such as "32,8,128".

    Raises
    ------
    PagedError
        If Triton is not installed.
    ValueError
        If these are not three numbers, or four where values have another size, of which heads can be made.
    """
    check_triton()
    from hf_paged_kernels.triton.ahead import AttentionLayer

    numbers = [int(number) if number.isdecimal() else 0 for number in heads.split(",")]
    if len(numbers) not in (3, 4) or min(numbers) < 1 or numbers[0] % numbers[1]:
        raise ValueError(
            f"--heads takes query heads, KV heads and a head's size, such as 32,8,128, and a fourth number if values "
            f"have another size; query heads are a multiple of KV heads; got {heads}"
        )
    num_heads, num_kv_heads, key_dim = numbers[:3]
    return AttentionLayer(num_heads, num_kv_heads, key_dim, numbers[-1], block_size, dtype, codes=codes)


def check_triton() -> None:
    """Raise PagedError if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise PagedError("Triton is not installed, and the GPU kernels need it: pip install triton, on Linux")
