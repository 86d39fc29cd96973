"""The same text-generation pipeline over a dense model and a paged one."""

import threading
import time

from transformers import pipeline

import hf_paged
from support import texts
from support.packing import pair

LENGTHS = {"max_new_tokens": 12, "do_sample": False}


def pipes(models=None, **options):
    """The same pipeline over the dense model and the paged one."""
    models = pair(token_budget=64) if models is None else models
    return [
        pipeline("text-generation", model=model, tokenizer=texts.tokenizer(), **{**LENGTHS, **options})
        for model in models
    ]


def rest(results) -> list:
    """Take the results left in a pipeline's iterator: ``iter`` would begin it anew."""
    return list(iter(results.__next__, None))


def settled(model) -> bool:
    """Tell whether all blocks come back, and all threads end, while no result is asked for.

    But for the thread of sections: it stays for as long as a pool of the process has memory to give back.
    """
    for _ in range(500):
        names = (thread.name for thread in threading.enumerate())
        threads = [name for name in names if name.startswith("hf_paged") and name != "hf_paged-state"]
        if not threads and not hf_paged.stats(model).used_blocks:
            return True
        time.sleep(0.01)
    return False
