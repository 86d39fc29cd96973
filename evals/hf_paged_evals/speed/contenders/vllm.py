"""vLLM, if it is installed."""

import functools
import importlib.util
import tempfile

from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.speed.contenders.interface import Lengths


class VLLM:
    """Its own engine over the same weights, without its prefix cache."""

    name, batch, pool_owner = "vLLM", None, None

    def __init__(self, models: ModelPair):
        self.models = models

    def obstacle(self) -> str | None:
        return "vllm is not installed" if importlib.util.find_spec("vllm") is None else None

    @functools.cached_property
    def _engine(self):
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            self.models.baseline.save_pretrained(folder)
            self.models.tokenizer.save_pretrained(folder)
            dtype = self.models.options.dtype
            return LLM(folder, dtype=dtype, enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True)

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0.0, max_tokens=lengths.new_tokens, ignore_eos=not lengths.stops)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(done.outputs[0].token_ids) for done in self._engine.generate(inputs, wanted, use_tqdm=False)]
