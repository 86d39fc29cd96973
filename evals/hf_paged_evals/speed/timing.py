"""Timed runs: their records, and the ratios made of them."""

import hashlib
import math
import time
from dataclasses import asdict
from statistics import median
from typing import NamedTuple

from transformers import PreTrainedModel

import hf_paged
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.speed.contenders import Contender, Lengths

_WARM = Lengths(4)


class Spread(NamedTuple):
    """A value and its 95 % interval, where there are enough values for one."""

    value: float
    low: float | None
    high: float | None


def timed(models: ModelPair, contender: Contender, prompts, warm, lengths: Lengths, stored=()) -> dict:
    """Run a contender once, after a short run over other prompts.

    Parameters
    ----------
    prompts, warm, stored : list of list of int
        Timed; run before; stored in the pool already. Nothing else of `prompts` is stored.

    Returns
    -------
    dict
        ``seconds``, tokens in and out, the hash of each answer, and the counters of the contender's pool, if it has
        one. ``{"obstacle": words}`` if it cannot run here.
    """
    obstacle = contender.obstacle()
    if obstacle is not None:
        return {"obstacle": obstacle}
    fresh_pool(models, contender, [*warm, *stored])
    with models.counting(contender.pool_owner) as counts:
        began = time.perf_counter()
        rows = contender.generate(prompts, lengths)
        seconds = time.perf_counter() - began
    record = {
        "seconds": seconds,
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(map(len, rows)),
        "answers": [digest(row) for row in rows],
    }
    if contender.pool_owner is None:
        return record
    return {**record, "pool": pool_state(contender.pool_owner) | vars(counts)}


def fresh_pool(models: ModelPair, contender: Contender, prompts) -> None:
    """Forget all that earlier runs stored, which would flatter the next one; then run `prompts`.

    A new pool's engine tries the model on a few tokens: that is over then, too.
    """
    models.release()
    contender.generate(prompts, _WARM)


def digest(row: list[int]) -> str:
    """A short name for an answer, to see which are equal."""
    return hashlib.sha256(",".join(map(str, row)).encode()).hexdigest()[:16]


def pool_state(model: PreTrainedModel) -> dict:
    """The numbers of `hf_paged.stats` now."""
    return {name: value for name, value in asdict(hf_paged.stats(model)).items() if _is_number(value)}


def prefix_hits(record: dict) -> float | None:
    """Share of the prompt tokens that lay in the pool already; None if the pool does not count them."""
    hits = record.get("pool", {}).get("prefix_hit_tokens")
    return None if hits is None else hits / record["prompt_tokens"]


def _is_number(value) -> bool:
    return isinstance(value, int | float)


def rate(records: list[dict], what: str = "new_tokens") -> float:
    """`what` a second, the median of a contender's turns."""
    return median(record[what] / record["seconds"] for record in records)


def ratio(slow: list[dict], fast: list[dict], what: str = "new_tokens") -> Spread:
    """The rate of `fast` over that of `slow`: the median of the turns' own ratios.

    The interval holds the median with 95 % confidence, from order statistics; below six turns there is none, and
    both ends are None.
    """
    slower = {record["turn"]: record[what] / record["seconds"] for record in slow}
    faster = {record["turn"]: record[what] / record["seconds"] for record in fast}
    ratios = sorted(faster[turn] / slower[turn] for turn in slower if turn in faster)
    return Spread(median(ratios), *_median_interval(ratios))


def _median_interval(ordered: list[float]) -> tuple[float, float] | tuple[None, None]:
    """Of the pairs of k-th values from both ends, the closest that misses the median at most once in 20 times."""
    count, tail, ends = len(ordered), 0.0, (None, None)
    for place in range(count // 2):
        tail += math.comb(count, place) / 2**count
        if 2 * tail > 0.05:
            break
        ends = ordered[place], ordered[-1 - place]
    return ends


def obstacles(records: list[dict]) -> list[str]:
    """A note for each contender that could not run."""
    reasons = {record["contender"]: record["obstacle"] for record in records if "obstacle" in record}
    return [f"{name} did not run: {reason}." for name, reason in reasons.items()]
