"""Long calls of both loops, and the tokens that they stream."""

import torch
from transformers import CompileConfig

from support import zoo
from support.packing import LENGTHS

# No cache that pages serve is compiled: the config changes nothing but the loop.
LOOPS = {"packed": {}, "original": {"compile_config": CompileConfig()}}

LONG = {**LENGTHS, "max_new_tokens": 150, "min_new_tokens": 150}


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return zoo.prompts([length], seed)["input_ids"][0]


def alone(model, ids, **options) -> list[int]:
    return model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options)[0, len(ids) :].tolist()


async def tokens_of(stream) -> list[int]:
    return [token async for token in stream]
