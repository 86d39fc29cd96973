"""How a request's answers are chosen: its parameters as processors of ``generate``.

A parameter that a request leaves out is the model's own, from its ``generation_config.json``, or OpenAI's default.
"""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_paged_integrations.serving.openai.constrained import Grammar
from hf_paged_integrations.serving.openai.processors import LogitBias, LogprobRecorder, Penalties, seeded
from hf_paged_integrations.serving.openai.schema import ChatRequest, CompletionRequest

# The model's own settings of these do nothing: what is left of them is in the processors of a request.
_OFF = {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_logits": False,
    "output_scores": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
}
_UNUSED_TOP_K = 50  # transformers' default, of which it does not warn in a greedy call.
_LEAST_TEMPERATURE = 1e-5  # Below it scores that are divided by it are no numbers.


@dataclass(frozen=True)
class Sampling:
    """The parameters of a request that decide which tokens are chosen.

    Attributes
    ----------
    temperature : float
        Near 0: the most likely token.
    top_p, min_p : float
    top_k : int
        0: all tokens.
    frequency_penalty, presence_penalty, repetition_penalty : float
    logit_bias : dict of int to float
    seed : int or None
    top_logprobs : int or None
        Most likely tokens whose log-probabilities are wanted; None: no log-probabilities are.
    grammar : Grammar or None
    max_new_tokens : int
    """

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    top_logprobs: int | None
    grammar: Grammar | None
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        request: ChatRequest | CompletionRequest,
        defaults: GenerationConfig,
        logit_bias: dict[int, float],
        top_logprobs: int | None,
        grammar: Grammar | None,
        max_new_tokens: int,
    ) -> "Sampling":
        """Take what the request says, else what the model's own config says, else OpenAI's default."""

        def chosen(name: str, default: float) -> float:
            values = (getattr(request, name), getattr(defaults, name, None), default)
            return float(next(value for value in values if value is not None))

        return cls(
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            top_k=max(0, int(chosen("top_k", 0))),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            logit_bias=logit_bias,
            seed=request.seed,
            top_logprobs=top_logprobs,
            grammar=grammar,
            max_new_tokens=max_new_tokens,
        )

    @property
    def is_random(self) -> bool:
        """Tell whether tokens are sampled."""
        return self.temperature >= _LEAST_TEMPERATURE

    @property
    def samples_itself(self) -> bool:
        """Tell whether ``generate`` is to sample; with a seed a processor does."""
        return self.is_random and self.seed is None

    def config(self, defaults: GenerationConfig) -> GenerationConfig:
        """The config of a call, with what else the model's own says."""
        config = copy.deepcopy(defaults)
        config.update(**_OFF, do_sample=self.samples_itself, max_length=None, max_new_tokens=self.max_new_tokens)
        config.top_k = 0 if self.samples_itself else _UNUSED_TOP_K
        if config.min_p is not None:
            config.min_p = 0.0
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(end_tokens(defaults)), 0)
        return config

    def processors(
        self, prompt_length: int, device: torch.device, recorder: LogprobRecorder | None
    ) -> list[LogitsProcessor]:
        """The processors of a call, in the order of transformers' own; `recorder` sees the scores before all."""
        found: list[LogitsProcessor] = [] if recorder is None else [recorder.processor]
        if self.logit_bias:
            found.append(LogitBias(self.logit_bias, device))
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.frequency_penalty or self.presence_penalty:
            found.append(Penalties(self.frequency_penalty, self.presence_penalty, prompt_length))
        if self.grammar is not None:
            found.append(self.grammar.processor(prompt_length))
        return found + self._warpers() if self.is_random else found

    def _warpers(self) -> list[LogitsProcessor]:
        found: list[LogitsProcessor] = []
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        if self.seed is not None:
            found.append(seeded(self.seed))
        return found


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end an answer."""
    found = config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
