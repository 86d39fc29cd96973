"""transformers' own continuous batching on the call of the stage `generate`."""

import importlib.util
from statistics import median

from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.stages import generate
from hf_paged_evals.gpu.timing import seconds_of

_FLASH_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn_3", "kernels")
_REPEATS = 2
# On a card it takes the sizes that it finds best; on a CPU these would be most of the memory.
_DRY = {"num_blocks": 16, "max_batch_tokens": 64, "max_memory_percent": 0.1, "max_requests_per_batch": 4}


def run(context: Context) -> None:
    """Time `generate_batch`. It takes what memory there is, so it has a process of its own."""
    shape, prompt, new = generate.sizes(context.is_dry)
    model = models.llama(shape, context.device)
    rows = 2 if context.is_dry else generate.ROWS
    inputs = models.prompts(context, shape, rows, prompt).tolist()
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(**(_DRY if context.is_dry else {}))
    tokens = []

    def call() -> None:
        outputs = model.generate_batch(inputs, config, batching, progress_bar=False)
        tokens[:] = [len(output.generated_tokens) for output in outputs.values()]

    call()
    seconds = median(seconds_of(context, call) for _ in range(_REPEATS))
    if sum(tokens) != rows * new:
        context.refuse("generate_batch", f"it gave {sum(tokens)} of {rows * new} tokens")
        return
    found = [name for name in _FLASH_PACKAGES if importlib.util.find_spec(name)]
    generate.say(
        context, "generate_batch", rows, seconds, implementation=model.config._attn_implementation,
        note=f"attention packages here: {', '.join(found) or 'no flash attention package, so it gathers for sdpa'}",
    )  # fmt: skip
