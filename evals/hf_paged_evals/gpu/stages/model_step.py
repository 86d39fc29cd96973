"""Decode steps of an 8B shape at a context of 2,048: captured, eager, beside the floor of the memory and dense.

The paged rows lie in the prefix cache after their first call, so that the calls that are timed run no prompts. Dense
begins with a cache of random states. Steps are timed through ``generate``, with all that it does around a forward.
"""

import functools

import torch
from transformers import PreTrainedModel

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.generation import dense_from_cache, greedy, step_ms
from hf_paged_evals.gpu.timing import copy_bandwidth, seconds_of

ROWS = (32, 1, 128)  # The bars come first.
CONTEXT = 2048
_FEW, _MANY, _REPEATS = 8, 40, 3
_KV_SHARE = 0.85  # Of the memory that the weights leave: keys and values. The rest is for activations.


def run(context: Context) -> None:
    """Time dense, then each way of ours, at every batch."""
    shape = models.TINY if context.is_dry else models.LLAMA_8B
    rows = (2, 1) if context.is_dry else ROWS
    tokens, few, many = (40, 2, 6) if context.is_dry else (CONTEXT, _FEW, _MANY)
    copy = copy_bandwidth(context)
    model = models.llama(shape, context.device)
    weights = models.read_weights(model)
    context.say("model", name=shape.name, weight_gb=weights / 1e9, kv_kib_a_token=shape.kv_bytes_a_token / 1024)
    floors = {
        batch: (weights + batch * (tokens + (few + many) / 2) * shape.kv_bytes_a_token) / copy * 1e3 for batch in rows
    }

    def say(engine: str, batch: int, step: float, **values) -> None:
        context.say(
            "step", engine=engine, model=shape.name, rows=batch, context=tokens, step_ms=step, floor_ms=floors[batch],
            over_floor=step / floors[batch], tokens_s=batch / step * 1e3, copy_tb_s=copy / 1e12, **values,
        )  # fmt: skip

    for batch in rows[:2]:
        with context.attempt(f"dense eager, {batch} rows"):
            _time_dense(context, model, shape, batch, (tokens, few, many), say)
    for engine, fields in models.capture_modes(context):
        budget = _budget(context, shape, max(rows), tokens + many)
        models.page(model, memory_budget=budget, prefix_cache_share=1.0, **fields)
        for batch in rows:
            if _kv_bytes(shape, batch, tokens + many) > budget:
                context.refuse(f"{engine}, {batch} rows", f"their keys and values need more than {budget:,} bytes")
                continue
            with context.attempt(f"{engine}, {batch} rows"):
                _time_paged(context, model, shape, batch, (tokens, few, many), functools.partial(say, engine))
    for batch in rows[2:]:
        models.forget(model)
        with context.attempt(f"dense eager, {batch} rows"):
            _time_dense(context, model, shape, batch, (tokens, few, many), say)


def _time_dense(context: Context, model: PreTrainedModel, shape: models.Shape, batch: int, sizes, say) -> None:
    tokens, few, many = sizes
    context.free()
    generate = dense_from_cache(model, models.prompts(context, shape, batch, tokens))
    generate(few)
    say("dense eager", batch, step_ms(context, generate, few, many, _REPEATS))


def _time_paged(context: Context, model: PreTrainedModel, shape: models.Shape, batch: int, sizes, say) -> None:
    tokens, few, many = sizes
    ids = models.prompts(context, shape, batch, tokens)
    first = seconds_of(context, lambda: greedy(model, ids, few))  # Runs the prompts, and captures at second use.
    generate = functools.partial(greedy, model, ids)
    generate(many)
    found = step_ms(context, generate, few, many, _REPEATS)
    say(batch, found, prefill_tokens_s=batch * tokens / first, counters=models.counters(model))


def _budget(context: Context, shape: models.Shape, rows: int, tokens: int) -> int:
    """Bytes for all rows, as far as the card has them."""
    wanted = _kv_bytes(shape, rows, tokens)
    if context.device.type != "cuda":
        return wanted
    context.free()
    return min(wanted, int(torch.cuda.mem_get_info(context.device)[0] * _KV_SHARE))


def _kv_bytes(shape: models.Shape, rows: int, tokens: int) -> int:
    """Keys and values of rows of so many tokens, and of the blocks that they do not fill."""
    return rows * (tokens + 64) * shape.kv_bytes_a_token
