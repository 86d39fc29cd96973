"""Contenders that transformers runs: dense, its own continuous batching, paged, and paged with prepacked weights."""

import abc

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.speed.contenders.interface import Lengths

_NEVER = -1  # An end-of-sequence id that no token has.


class Padded(abc.ABC):
    """``generate`` over left-padded batches of `batch` rows; None: all rows in one."""

    def __init__(self, models: ModelPair, batch: int | None):
        self.models, self.batch = models, batch

    @property
    @abc.abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that generates."""

    @property
    def pool_owner(self) -> PreTrainedModel | None:
        return None

    def obstacle(self) -> str | None:
        return None

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        size, rows = self.batch or len(prompts), []
        for first in range(0, len(prompts), size):
            rows += self._one_batch(prompts[first : first + size], lengths)
        return rows

    def _one_batch(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        end = end_token(self.models)
        inputs = padded(self.models, prompts)
        output = self.model.generate(**inputs, **arguments(self.models, lengths))
        return [
            up_to(end if lengths.stops else None, row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()
        ]


class Dense(Padded):
    """transformers' own cache."""

    name = "dense"

    @property
    def model(self) -> PreTrainedModel:
        return self.models.baseline


class Paged(Padded):
    """The backend of the run, paged unless its options say otherwise."""

    name = "paged"

    @property
    def model(self) -> PreTrainedModel:
        return self.models.backend

    @property
    def pool_owner(self) -> PreTrainedModel:
        return self.model


class Prepacked(Paged):
    """The backend with prepacked weights."""

    name = "paged, prepacked"

    def obstacle(self) -> str | None:
        backend = self.models.options.backend
        return None if backend == "paged" else f"the backend is {backend!r}, which prepacks nothing"

    @property
    def model(self) -> PreTrainedModel:
        return self.models.prepacked


class GenerateBatch:
    """transformers' ``generate_batch``."""

    name, batch, pool_owner = "generate_batch", None, None
    # More blocks of its 256 tokens take more memory than a small machine has.
    _config = {"num_blocks": 100, "max_batch_tokens": 512, "max_memory_percent": 0.5, "max_requests_per_batch": 32}

    def __init__(self, models: ModelPair):
        self.models = models

    def obstacle(self) -> str | None:
        return None

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        wanted = GenerationConfig(**arguments(self.models, lengths))
        outputs = self.models.baseline.generate_batch(prompts, wanted, ContinuousBatchingConfig(**self._config))
        rows = [outputs[f"req_{number}"].generated_tokens for number in range(len(prompts))]
        return [up_to(end_token(self.models) if lengths.stops else None, row) for row in rows]


def arguments(models: ModelPair, lengths: Lengths) -> dict:
    """Arguments of a greedy ``generate`` whose answers have these lengths."""
    return {
        "max_new_tokens": lengths.new_tokens,
        "do_sample": False,
        "eos_token_id": end_token(models) if lengths.stops else _NEVER,
        "pad_token_id": models.tokenizer.pad_token_id,
    }


def end_token(models: ModelPair) -> int:
    return models.tokenizer.eos_token_id


def padded(models: ModelPair, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts as a left-padded batch, ``[rows, positions]``."""
    batch = models.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    return {name: batch[name].to(models.device) for name in ("input_ids", "attention_mask")}


def up_to(end: int | None, row: list[int]) -> list[int]:
    """A row up to its end, which is counted."""
    return row[: row.index(end) + 1] if end in row else row
