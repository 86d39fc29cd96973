"""Prompts of the speed tasks: real ones, or random tokens where only lengths matter."""

import random
from pathlib import Path

from hf_paged_evals.suite.models import load_tokenizer
from hf_paged_evals.suite.options import Options

from hf_paged_evals.accuracy import sources

# Examples before the question in the paper's translation prompts, by their tokens.
SHOTS = {"1-shot": 80, "5-shot": 341}
_WARM = 2


def ragged(options: Options, count: int, most: int) -> list[list[int]]:
    """ShareGPT's first turns, or prompts of the dataset that the options name, of at most `most` tokens.

    Raises
    ------
    ValueError
        If there are none so short.
    """
    found = list(sources.prompts(load_tokenizer(options), options, 0, count, most).values())
    if not found:
        raise ValueError(f"no prompt has at most {most} tokens: allow longer ones, or take another dataset")
    return found


def source(options: Options) -> str:
    """Where the ragged prompts come from, as a report names them."""
    if options.dataset is None:
        return "ShareGPT's ragged prompts"
    name = options.dataset.name
    return f"the ragged prompts of {Path(name).name if Path(name).exists() else name}"


def uniform(options: Options, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, no two prompts alike. Special tokens are not among them."""
    words = load_tokenizer(options)
    allowed = sorted(set(range(len(words))) - set(words.all_special_ids))
    chosen = random.Random(f"{options.seed} {seed} {length}")
    return [[chosen.choice(allowed) for _ in range(length)] for _ in range(sources.cut(options, count))]


def shared_prefix(options: Options, count: int, prefix: int, own: int) -> list[list[int]]:
    """Prompts that begin with the same `prefix` tokens and go on with `own` tokens of their own."""
    (start,) = uniform(options, 1, prefix, seed=1)
    return [start + rest for rest in uniform(options, count, own, seed=2)]


def warming(prompts: list[list[int]], options: Options) -> list[list[int]]:
    """Prompts about as long as these and with no prefix in common with them: what a contender runs first."""
    longest = sorted(map(len, prompts))[-_WARM:]
    return [uniform(options, 1, length, seed=3 + place)[0] for place, length in enumerate(longest)]
