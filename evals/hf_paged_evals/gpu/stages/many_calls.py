"""Many calls of one row at once, as pipelines and servers make them, beside one call of as many rows."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.timing import seconds_of


def run(context: Context) -> None:
    """Time both, greedy and sampled."""
    shape = models.TINY if context.is_dry else models.LLAMA_1B
    count, prompt, new = (4, 12, 4) if context.is_dry else (128, 40, 32)
    model = models.llama(shape, context.device)
    models.page(model, memory_budget=(count + 2) * (prompt + count + new + 64) * shape.kv_bytes_a_token)
    rows = [models.prompts(context, shape, 1, prompt + number) for number in range(count)]
    both, mask = _padded(rows)
    calls = {
        "calls of one row": lambda **options: _at_once(model, rows, new, **options),
        "one call": lambda **options: model.generate(both, attention_mask=mask, max_new_tokens=new, **options),
    }
    for what, call in calls.items():
        for do_sample in (False, True):
            with context.attempt(f"{what}, {'sampled' if do_sample else 'greedy'}"):
                torch.manual_seed(0)
                call(do_sample=do_sample)
                seconds = seconds_of(context, functools.partial(call, do_sample=do_sample))
                context.say(
                    "many_calls", what=what, sampled=do_sample, rows=count, new_tokens=new, seconds=seconds,
                    tokens_s=count * new / seconds, counters=models.counters(model),
                )  # fmt: skip


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one batch with pads on the left, and their mask, each ``[rows, longest]``."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row[0], 1
    return ids, mask


def _at_once(model, rows: list[torch.Tensor], new: int, **options) -> None:
    with ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(lambda row: model.generate(row, max_new_tokens=new, **options), rows))
