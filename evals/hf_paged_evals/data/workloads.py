"""Prompts of the speed tasks and microbenchmarks: real ones, or random tokens where only lengths matter."""

import random
from pathlib import Path

from hf_paged_evals.data import sources
from hf_paged_evals.models.pair import load_tokenizer
from hf_paged_evals.runner.options import Options

# Examples before the question in the paper's translation prompts, by their tokens.
SHOTS = {"1-shot": 80, "5-shot": 341}
_WARM_ROWS = 2
_LONGEST = 1024  # tokens of a prompt that is a part of a longer text


def ragged(options: Options, count: int, max_tokens: int) -> list[list[int]]:
    """ShareGPT's first turns, or prompts of the dataset that the options name, of at most `max_tokens` tokens.

    Raises
    ------
    ValueError
        If there are none so short.
    """
    found = list(sources.prompts(load_tokenizer(options), options, 0, count, max_tokens).values())
    if not found:
        raise ValueError(f"no prompt has at most {max_tokens} tokens: allow longer ones, or take another dataset")
    return found


def source(options: Options) -> str:
    """The source of the ragged prompts, as a report names it."""
    if options.dataset is None:
        return "ShareGPT's ragged prompts"
    name = options.dataset.name
    return f"the ragged prompts of {Path(name).name if Path(name).exists() else name}"


def uniform(options: Options, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, no two prompts alike. Special tokens are not among them."""
    tokenizer = load_tokenizer(options)
    allowed = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    chosen = random.Random(f"{options.seed} {seed} {length}")
    return [[chosen.choice(allowed) for _ in range(length)] for _ in range(sources.cut(options, count))]


def running_text(options: Options, length: int) -> list[int]:
    """`length` tokens of ragged prompts, one after another: a long prompt that is no noise.

    Raises
    ------
    ValueError
        If all prompts together are shorter.
    """
    text: list[int] = []
    for prompt in ragged(options, length, max(length, _LONGEST)):
        text += prompt
        if len(text) >= length:
            return text[:length]
    raise ValueError(f"all prompts together hold {len(text)} tokens, {length} were asked for: ask for fewer")


def shared_prefix(options: Options, count: int, prefix: int, own: int) -> list[list[int]]:
    """Prompts that begin with the same `prefix` tokens and go on with `own` tokens each."""
    (start,) = uniform(options, 1, prefix, seed=1)
    return [start + rest for rest in uniform(options, count, own, seed=2)]


def warming(prompts: list[list[int]], options: Options) -> list[list[int]]:
    """Prompts about as long as these and with no prefix in common with them: what a contender runs first."""
    longest = sorted(map(len, prompts))[-_WARM_ROWS:]
    return [uniform(options, 1, length, seed=3 + place)[0] for place, length in enumerate(longest)]
