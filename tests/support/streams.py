"""Long calls of both loops, and the tokens that they stream."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from support import zoo
from support.packing import LENGTHS


class Same(LogitsProcessor):
    """Changes nothing, but is in no table of processors: the call runs transformers' own loop."""

    def __call__(self, input_ids, scores):
        return scores


LOOPS = {"packed": {}, "original": {"logits_processor": LogitsProcessorList([Same()])}}


LONG = {**LENGTHS, "max_new_tokens": 150, "min_new_tokens": 150}


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return zoo.prompts([length], seed)["input_ids"][0]


def alone(model, ids, **options) -> list[int]:
    return model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options)[0, len(ids) :].tolist()


async def tokens_of(stream) -> list[int]:
    return [token async for token in stream]
