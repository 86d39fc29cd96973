"""The names of transformers and torch that no documentation promises, and that hf_paged relies on."""

import importlib
import inspect
import types
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Symbol:
    """A private name, or an undocumented one.

    Attributes
    ----------
    module : str
        The module that defines it.
    path : str
        Attributes that lead to it from there.
    word : str or None
        For what exists in instances or calls alone: a name in the code of the function at `path`, such as an
        attribute that a constructor sets, or a variable of a closure.
    """

    module: str
    path: str
    word: str | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.path}" + (f" ({self.word})" if self.word else "")

    def is_there(self) -> bool:
        """Tell whether the installed packages have it. Imports its module."""
        try:
            found: Any = importlib.import_module(self.module)
            for name in self.path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            return False
        return self.word is None or self.word in words_of(inspect.unwrap(found).__code__)


def missing_symbols() -> list[Symbol]:
    """The symbols that the installed transformers and torch lack, and that hf_paged cannot do without."""
    return [symbol for symbol in SYMBOLS if symbol not in OPTIONAL and not symbol.is_there()]


def words_of(code: types.CodeType) -> set[str]:
    """Names and strings in compiled code, and in the functions within it."""
    words = {code.co_name, *code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, str):
            words.add(constant)
        elif isinstance(constant, types.CodeType):
            words |= words_of(constant)
    return words


# By defining module, what import finds.
_ATTRIBUTES = {
    "transformers.configuration_utils": ["PreTrainedConfig._attn_implementation"],
    "transformers.modeling_utils": [
        "AttentionInterface._global_mapping",
        "PreTrainedModel._supports_flash_attn",
        "PreTrainedModel._supports_sdpa",
        "PreTrainedModel.get_correct_attn_implementation",
    ],
    "transformers.masking_utils": [
        "AttentionMaskInterface._global_mapping",
        "bidirectional_mask_function",
        "causal_mask_function",
        "eager_mask",
    ],
    "transformers.utils.output_capturing": ["_active_collector"],
    "transformers.models.auto.modeling_auto": [
        "AutoModelForCausalLM._model_mapping",
        "AutoModelForImageTextToText._model_mapping",
    ],
    "transformers.models.gpt_neo.modeling_gpt_neo": ["GPT_NEO_ATTENTION_CLASSES"],
    "transformers.generation.utils": [
        "GenerationMixin._assisted_decoding",
        "GenerationMixin._beam_search",
        "GenerationMixin._prefill",
        "GenerationMixin._prepare_generation_config",
        "GenerationMixin._sample",
        "GenerationMixin._supports_logits_to_keep",
        "GenerationMixin._update_model_kwargs_for_generation",
    ],
    "transformers.generation.continuous_batching.cache": ["PagedAttentionCache"],
    "transformers.generation.continuous_batching.continuous_api": [
        "ContinuousBatchingManager.switch_to_cb_friendly_attn"
    ],
    "transformers.generation.continuous_batching.input_outputs": ["attn_mask_is_needed"],
    "transformers.integrations.eager_paged": ["eager_paged_attention_forward"],
    "transformers.pipelines.base": ["Pipeline.forward", "Pipeline.get_iterator"],
    "transformers.pipelines.text_generation": [
        "TextGenerationPipeline._forward",
        "TextGenerationPipeline._prepare_generate_kwargs",
    ],
    "torch": [
        "Tensor._make_wrapper_subclass",
        "Tensor._version",
        "_C.DispatchKey.CPU",
        "_C.DispatchKeySet",
        "_C._len_torch_dispatch_stack",
        "_C._len_torch_function_stack",
        "ops.aten._to_copy.default._schema.is_mutable",
        "ops.mkldnn._is_mkldnn_bf16_supported",
        "ops.mkldnn._is_mkldnn_fp16_supported",
        "ops.mkldnn._linear_pointwise",
        "ops.mkldnn._reorder_linear_weight",
    ],
    "torch.nn.modules.module": ["_has_any_global_hook"],
    "torch.utils._device": ["DeviceContext"],
    "torch.overrides": ["_get_current_function_mode_stack"],
    "torch.utils._python_dispatch": ["_get_current_dispatch_mode_stack", "is_traceable_wrapper_subclass"],
    "torch.utils._pytree": ["tree_map_only"],
}
# By module and function, words of the function's code.
_WORDS = {
    ("transformers.masking_utils", "and_masks"): ["and_mask", "mask_functions"],
    ("transformers.modeling_utils", "PreTrainedModel._set_gradient_checkpointing"): ["_gradient_checkpointing_func"],
    ("transformers.modeling_utils", "PreTrainedModel._initialize_weights"): ["_is_hf_initialized"],
    ("transformers.configuration_utils", "PreTrainedConfig.__post_init__"): ["_name_or_path"],
    ("transformers.masking_utils", "sliding_window_overlay"): ["inner_mask", "sliding_window"],
    ("transformers.generation.utils", "GenerationMixin._prepare_special_tokens"): ["_pad_token_tensor"],
    ("transformers.generation.utils", "GenerationMixin._prepare_cache_for_generation"): ["_is_user_defined"],
    ("transformers.pipelines.pt_utils", "PipelineIterator.__init__"): ["loader", "infer", "params"],
    # Not in the constructor, in whose place torch._dynamo puts another one.
    ("torch.nn", "Module.__getattr__"): ["_buffers", "_modules", "_parameters"],
    ("torch.nn", "Module.register_forward_hook"): ["_forward_hooks"],
    ("torch.nn", "Module.register_forward_pre_hook"): ["_forward_pre_hooks"],
    ("torch._dynamo.eval_frame", "_TorchDynamoContext.__init__"): ["callback"],
    ("accelerate.hooks", "add_hook_to_module"): ["_hf_hook", "_old_forward"],
    ("torch._dynamo.eval_frame", "_create_delayed_compile_callback"): ["_torchdynamo_orig_backend"],
}

# What some of the supported versions lack, and `compat` replaces there.
OPTIONAL = {Symbol("transformers.pipelines.text_generation", "TextGenerationPipeline._prepare_generate_kwargs")}

# The tests fail on a name that `compat` uses and this lacks, and on one that it lists in vain.
SYMBOLS = (
    *(Symbol(module, path) for module, paths in _ATTRIBUTES.items() for path in paths),
    *(Symbol(module, path, word) for (module, path), words in _WORDS.items() for word in words),
)
