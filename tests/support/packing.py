"""Pairs of models whose paged half runs packed steps of a few tokens, and how they are compared."""

import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution.model_runner import ModelRunner
from support import zoo
from support.parity import assert_rows_equal

LENGTHS = {"max_new_tokens": 20, "pad_token_id": 0}
SAMPLE = {"do_sample": True, "top_k": 30, "temperature": 1.2}
# Bytes of one block of 4 tokens in the tiny llama: 2 layers, 2 heads, keys and values of 16 floats.
BLOCK = 4 * 2 * 2 * 2 * 16 * 4


def pair(blocks: int | None = None, token_budget: int = 16, name: str = "llama"):
    """Dense and paged models; steps of few tokens, so that rows are at different steps at the same time."""
    dense, paged = zoo.pair(name)
    budget = None if blocks is None else blocks * BLOCK
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget=budget, token_budget=token_budget))
    return dense, paged


def watch_steps(monkeypatch, observe) -> list:
    """A list that gets ``observe(inputs)`` of each step that an engine runs from now on."""
    seen, execute = [], ModelRunner.execute

    def watched(self, model, inputs):
        seen.append(observe(inputs))
        return execute(self, model, inputs)

    monkeypatch.setattr(ModelRunner, "execute", watched)
    return seen


def compare(models, inputs, **options):
    """Tokens and the final state of the random numbers, dense against packed."""
    outputs, states = [], []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **{**LENGTHS, **options}))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the generator ended in another state"
    assert_rows_equal(models[0], inputs, *outputs)
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls and not stats.fallbacks and stats.page_reads and not stats.gathers
    return outputs[1]
