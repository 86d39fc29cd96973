"""Whole calls of ``generate`` with a 1B shape, prompts included, beside dense."""

import functools
from statistics import median

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.generation import greedy
from hf_paged_evals.gpu.timing import seconds_of

ROWS, PROMPT, NEW = 32, 512, 256
_REPEATS = 3
_MORE_ROWS = (1, 128)  # Beside those of the bar; one run each.
_SECONDS_OF_A_BATCH = 15.0  # With fewer left, a batch is not begun.


def sizes(is_dry: bool) -> tuple[models.Shape, int, int]:
    """The shape, the tokens of a prompt, and the new ones: those of every stage that times this call."""
    return (models.TINY, 24, 8) if is_dry else (models.LLAMA_1B, PROMPT, NEW)


def run(context: Context) -> None:
    """Time dense, then each way of ours, in the batch of the bar first."""
    shape, prompt, new = sizes(context.is_dry)
    model = models.llama(shape, context.device)
    for rows in (2,) if context.is_dry else (ROWS, *_MORE_ROWS):
        if rows != ROWS and context.seconds_left < _SECONDS_OF_A_BATCH:
            context.refuse(f"generate, {rows} rows", "the time of the stage is over")
            continue
        ids = models.prompts(context, shape, rows, prompt)
        call, repeats = functools.partial(greedy, model, ids, new), 1 if rows in _MORE_ROWS else _REPEATS
        models.forget(model)
        with context.attempt(f"dense eager, {rows} rows"):
            say(context, "dense eager", rows, _time(context, call, 1, repeats))
        for engine, fields in models.capture_modes(context):
            # No prompt is found again: each call runs its own.
            models.page(model, memory_budget=_budget(shape, rows, prompt + new), prefix_cache=False, **fields)
            with context.attempt(f"{engine}, {rows} rows"):
                seconds = _time(context, call, 2, repeats)  # A step is captured at its second use.
                say(context, engine, rows, seconds, counters=models.counters(model))


def say(context: Context, engine: str, rows: int, seconds: float, **values) -> None:
    """Record one engine's time for the call of this stage."""
    shape, prompt, new = sizes(context.is_dry)
    context.say(
        "generate", engine=engine, model=shape.name, rows=rows, prompt=prompt, new_tokens=new, seconds=seconds,
        tokens_s=rows * new / seconds, **values,
    )  # fmt: skip


def _time(context: Context, call, warming: int, repeats: int) -> float:
    """Median seconds of a call, after some that compile and capture."""
    for _ in range(warming):
        call()
    return median(seconds_of(context, call) for _ in range(repeats))


def _budget(shape: models.Shape, rows: int, tokens: int) -> int:
    """Bytes of all rows' keys and values, and some to spare."""
    return (rows + 2) * (tokens + 64) * shape.kv_bytes_a_token
