"""``cache_implementation="static"``, which transformers compiles on a card, on the call of the stage `generate`."""

import functools

from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.generation import greedy
from hf_paged_evals.gpu.stages import generate
from hf_paged_evals.gpu.timing import seconds_of


def run(context: Context) -> None:
    """Time each call as it comes: the first ones compile, and the last one that fits counts."""
    shape, prompt, new = generate.sizes(context.is_dry)
    model = models.llama(shape, context.device)
    rows = 2 if context.is_dry else generate.ROWS
    ids = models.prompts(context, shape, rows, prompt)
    call = functools.partial(greedy, model, ids, new, cache_implementation="static")
    for number in range(3):
        generate.say(context, "dense, static cache, compiled", rows, seconds_of(context, call), call=number)
