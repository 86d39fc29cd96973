"""KV formats beside the dense cache: bytes of a token, perplexity, greedy tokens and needles, on the same samples.

Bytes are those of the pages that a run has left behind. A contender's difference is paired with the dense model of the
same dtype; "native" are pages in that dtype.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel

import hf_paged
from hf_paged.memory.kv_format import KV_FORMATS
from hf_paged_evals.accuracy.generation import first_difference, forced_length, generate
from hf_paged_evals.accuracy.greedy import GreedyMatch
from hf_paged_evals.accuracy.needle import NeedleInHaystack
from hf_paged_evals.accuracy.perplexity import Perplexity
from hf_paged_evals.accuracy.windows import losses
from hf_paged_evals.models.pair import ModelPair, name_of
from hf_paged_evals.runner.arguments import add_dataset, add_model, dataset_of
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_evals.runner.statistics import PairedOutcomes, bootstrap_ratio, proportion
from hf_paged_evals.runner.task import Sample

NAME = "kv_formats"
NATIVE = "native"
_PERPLEXITY, _GREEDY, _NEEDLE = Perplexity(), GreedyMatch(), NeedleInHaystack()
_TASKS = (_PERPLEXITY, _GREEDY, _NEEDLE)


@dataclass
class _Outcome:
    """The results of one contender.

    Attributes
    ----------
    bytes_per_token : int
        In the pages of all layers.
    nats : list of float
        By window, the likelihood that it lost against dense.
    ends : list of int or None
        By prompt, the first token that differs from dense; None: all are equal.
    found : list of bool
        By haystack, whether the answer holds the needle.
    """

    bytes_per_token: int = 0
    nats: list[float] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this measurement."""
    add_model(parser)
    parser.add_argument(
        "--kv-dtype", nargs="+", default=list(KV_FORMATS), choices=KV_FORMATS, help="(default: all formats)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N windows, prompts of a kind and lengths")
    add_dataset(parser)


def measure(given: argparse.Namespace) -> Section:
    """Bytes, perplexity, greedy tokens and needles of each format."""
    names = tuple(task.name for task in _TASKS)
    dataset, quick = dataset_of(given), given.quick
    options = Options("", names, given.model, given.dtype, given.limit, seed=given.seed, quick=quick, dataset=dataset)
    # All of them first: data that is not there stops the run before its first hour.
    windows, prompts, haystacks = (task.samples(options) for task in _TASKS)
    models = ModelPair(options)
    contenders = {NATIVE: models.backend}
    contenders |= {name: models.paged_as(kv_dtype=name) for name in given.kv_dtype}
    outcomes = {name: _Outcome() for name in contenders}
    tokens = list(_perplexity(windows, models, contenders, outcomes))
    _greedy(prompts, models, contenders, outcomes)
    found = _needles(haystacks, models, contenders, outcomes)
    for name, model in contenders.items():
        outcomes[name].bytes_per_token = hf_paged.stats(model).bytes_per_token
    figures, rows = [], []
    for name, outcome in outcomes.items():
        some = _figures(name, outcome, tokens, found, outcomes[NATIVE].bytes_per_token, options)
        figures += some
        rows.append([name, *map(_cell, some)])
    columns = ["KV format", *(figure.name.partition(": ")[2] for figure in figures[: len(rows[0]) - 1])]
    length = options.settings_of(_GREEDY)["new_tokens"]
    return Section(
        NAME,
        "KV formats",
        f"{len(contenders)} formats of {name_of(options)} in {given.dtype}, {len(tokens)} windows, "
        f"{len(outcomes[NATIVE].ends)} prompts of {length} new tokens, {len(found)} haystacks, "
        f"of which dense finds {sum(found)}.",
        figures,
        [Table("By format", columns, rows)],
        notes=[_peers()],
    )


def _perplexity(
    samples: list[Sample], models: ModelPair, contenders: dict[str, PreTrainedModel], outcomes: dict[str, _Outcome]
) -> Iterator[int]:
    """Score all windows; yields the scored tokens of each."""
    for sample in samples:
        batch, chunk = sample.payload["windows"], sample.payload["chunk"]
        dense = losses(models.baseline, batch, chunk)
        for name, model in contenders.items():
            scored = zip(dense, losses(model, batch, chunk))
            outcomes[name].nats += [float((second - first).sum()) for first, second in scored]
        yield from map(len, dense)


def _greedy(
    samples: list[Sample], models: ModelPair, contenders: dict[str, PreTrainedModel], outcomes: dict[str, _Outcome]
) -> None:
    for sample in samples:
        prompts, length = list(sample.payload["prompts"].values()), forced_length(sample.payload["new_tokens"])
        dense = generate(models.baseline, models.tokenizer, prompts, sample.payload["baseline_batch"], **length)
        for name, model in contenders.items():
            rows = generate(model, models.tokenizer, prompts, sample.payload["batch"], **length)
            outcomes[name].ends += map(first_difference, dense, rows)


def _needles(
    samples: list[Sample], models: ModelPair, contenders: dict[str, PreTrainedModel], outcomes: dict[str, _Outcome]
) -> list[bool]:
    """Search all haystacks; returns where dense finds its needle."""
    found = []
    for sample in samples:
        prompts, answers = sample.payload["prompts"], sample.payload["answers"]
        for name, model in {"": models.baseline, **contenders}.items():
            rows = generate(
                model,
                models.tokenizer,
                prompts,
                len(prompts) if name else 1,
                max_new_tokens=sample.payload["new_tokens"],
            )
            texts = [models.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            hits = [answer in text for answer, text in zip(answers, texts)]
            (outcomes[name].found if name else found).extend(hits)
    return found


def _figures(
    name: str, outcome: _Outcome, tokens: list[int], dense_found: list[bool], native_bytes: int, options: Options
) -> list[Figure]:
    change = bootstrap_ratio(outcome.nats, [float(count) for count in tokens], options.seed)
    length = options.settings_of(_GREEDY)["new_tokens"]
    ends = [length if end is None else end for end in outcome.ends]
    equal = proportion(sum(end is None for end in outcome.ends), len(ends)).times(100)
    needles = PairedOutcomes.count(dense_found, outcome.found).difference().times(100)
    share = 100 * outcome.bytes_per_token / native_bytes
    return [
        Figure(f"{name}: bytes of a token", outcome.bytes_per_token, "bytes", better="lower"),
        Figure(f"{name}: of native", share, "%", better="lower"),
        Figure(f"{name}: perplexity difference", change.value, "nats/token", change.low, change.high, "lower"),
        Figure(f"{name}: rows equal", equal.value, "%", equal.low, equal.high, "higher"),
        Figure(
            f"{name}: tokens before the first divergence", 100 * sum(ends) / (length * len(ends)), "%", better="higher"
        ),
        Figure(f"{name}: needles found", 100 * sum(outcome.found) / len(outcome.found), "%", better="higher"),
        Figure(f"{name}: needles, difference", needles.value, "points", needles.low, needles.high, "higher"),
    ]


def _cell(figure: Figure) -> str:
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.4g}{interval} {figure.unit}"


def _peers() -> str:
    """Why transformers' own quantised cache is not among the contenders."""
    return (
        "transformers' QuantizedCache is not beside them: it needs optimum-quanto or hqq, keeps the last tokens "
        "unquantised, and serves none of copy-on-write, prefix cache or packed rows."
    )


main = Script("kv-formats", __doc__, add_settings, measure, {"limit": 2}).main

if __name__ == "__main__":
    sys.exit(main())
