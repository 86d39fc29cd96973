"""Calls as programs make them, dense and paged in turns: chats that stop on tokens, TRL's sampling, lm-eval's batches.

Six threads that each call `generate` on one row with a stopping criterion of their own; equal prompts that are sampled
in evaluation mode and in training mode; and a ragged batch whose criterion ends it when every row has had its stop
sequence. Nothing is found in the prefix cache: weights that are trained leave nothing to find.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import hf_paged
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.models.pair import load_model
from hf_paged_evals.models.tiny import tiny_config, tiny_model
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section

NAME = "programs"
QUICK = {"threads": 3, "prompt": 24, "completions": 3, "rows": 3, "new_tokens": 6, "repeats": 1}
_TINY = "tiny"
_THREADS, _TRAINING, _BATCH = "threads with a criterion", "equal prompts", "batch with a criterion"

# A contender: the output of one turn.
Run = Callable[[], list[torch.Tensor]]


class StopOnTokens(StoppingCriteria):
    """Ends a call on some tokens, as examples of LangChain and LlamaIndex do: it looks at the first row alone."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> bool:
        return int(input_ids[0][-1]) in self._tokens


class EverySequence(StoppingCriteria):
    """Ends a batch when every row has had a sequence of tokens, as lm-eval's `MultiTokenEOSCriteria` does."""

    def __init__(self, sequence: Sequence[int], width: int, rows: int):
        self._sequence, self._width, self._done = list(sequence), width, [False] * rows

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> bool:
        tails = input_ids[:, self._width :][:, -len(self._sequence) :].tolist()
        self._done = [done or tail == self._sequence for done, tail in zip(self._done, tails)]
        return all(self._done)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser)
    parser.set_defaults(model=_TINY)
    parser.add_argument("--threads", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=212, help="tokens of the longest prompt (default: %(default)s)")
    parser.add_argument("--completions", type=int, default=8, help="of the equal prompts (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="of the batch (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of each program, by model and mode, and how many calls were packed."""
    dense, paged = (_load(given, implementation) for implementation in ("sdpa", "paged"))
    hf_paged.configure(paged, hf_paged.PagedConfig(prefix_cache=False))
    outputs: dict[str, list[torch.Tensor]] = {}
    packed: dict[str, int] = {}

    def run(name: str, model: PreTrainedModel, contender: Run, _: int) -> None:
        before = hf_paged.stats(paged).packed_calls if model is paged else 0
        outputs[name] = contender()
        packed[name] = hf_paged.stats(paged).packed_calls - before if model is paged else 0

    contenders = {
        name: functools.partial(run, name, model, contender)
        for mode, model in (("dense", dense), ("paged", paged))
        for name, contender in _programs(mode, model, given).items()
    }
    seconds = {name: median(times) for name, times in take_turns(contenders, given.repeats).items()}
    calls = {_THREADS: given.threads, _TRAINING: 1, _BATCH: 1}
    figures = [Figure(name, value, "s", better="lower") for name, value in seconds.items()]
    for name in (name for name in seconds if "paged" in name):
        program = name.partition(":")[0]
        rival = f"{program}: dense{', training mode' if program == _TRAINING else ''}"
        speed = seconds[rival] / seconds[name]
        equal = sum(map(torch.equal, outputs[name], outputs[rival]))
        figures += [
            Figure(f"{name}, speed over dense", speed, "x", better="higher"),
            Figure(f"{name}, packed calls", packed[name], f"of {calls[program]}"),
            Figure(f"{name}, outputs equal to dense", equal, f"of {len(outputs[name])}"),
        ]
    return Section(
        NAME,
        "Calls as programs make them",
        f"{sum(packed.values())} of {sum(calls.values()) + 1} paged calls were packed.",
        figures,
        notes=[
            f"Prompts of up to {given.prompt} random tokens, at most {given.new_tokens} new ones; medians of "
            f"{given.repeats} turns. {hf_paged.stats(paged).fallbacks or 'No call fell back'}."
        ],
    )


def _load(given: argparse.Namespace, implementation: str) -> PreTrainedModel:
    if given.model == _TINY:
        config = tiny_config("llama", max_position_embeddings=given.prompt + given.new_tokens)
        return tiny_model(config, implementation, getattr(torch, given.dtype))
    return load_model(model_options(given, NAME), implementation)


def _programs(mode: str, model: PreTrainedModel, given: argparse.Namespace) -> dict[str, Run]:
    """The contenders of one model, by name."""
    generator = torch.Generator().manual_seed(given.seed)
    draw = functools.partial(torch.randint, 3, model.config.vocab_size, generator=generator)
    chats = [draw((1, given.prompt - 3 * number)) for number in range(given.threads)]
    prompt, batch = draw((1, given.prompt)).repeat(given.completions, 1), draw((given.rows, given.prompt))
    mask = torch.ones_like(batch)
    for row in range(given.rows):
        mask[row, : row * given.prompt // (2 * given.rows)] = 0
    stop = draw((2,)).tolist()
    generate = functools.partial(model.generate, max_new_tokens=given.new_tokens, pad_token_id=0, do_sample=False)

    def chat(ids: torch.Tensor) -> torch.Tensor:
        criteria = StoppingCriteriaList([StopOnTokens(stop)])
        return generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria)

    def in_threads() -> list[torch.Tensor]:
        with ThreadPoolExecutor(given.threads) as threads:
            return list(threads.map(chat, chats))

    def sampled(training: bool) -> list[torch.Tensor]:
        model.train(training)
        try:
            torch.manual_seed(given.seed)
            return [generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True)]
        finally:
            model.eval()

    def in_one_batch() -> list[torch.Tensor]:
        criteria = StoppingCriteriaList([EverySequence(stop, given.prompt, given.rows)])
        return [generate(batch, attention_mask=mask, stopping_criteria=criteria)]

    return {
        f"{_THREADS}: {mode}": in_threads,
        f"{_TRAINING}: {mode}, evaluation mode": functools.partial(sampled, False),
        f"{_TRAINING}: {mode}, training mode": functools.partial(sampled, True),
        f"{_BATCH}: {mode}": in_one_batch,
    }


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
