"""The memory of a step beside the blocks, as the meter says, against sums worked out by hand."""

import functools

import torch

from hf_paged.cli.plan.footprint import footprint
from hf_paged.execution.workspace import WorkspaceMeter
from hf_paged.models import registry
from hf_paged_integrations.transformers import trial
from support import zoo

VOCAB = 11


def step(weight: torch.Tensor, num_tokens: int, num_rows: int, device="cpu") -> torch.Tensor:
    """A forward: 3 numbers a token live at once, then logits twice; the weight is unpacked for its product."""
    hidden = torch.ones(num_tokens, 1, device=device)
    wide = hidden.expand(num_tokens, 2) + 1.0
    unpacked = weight + 1.0
    del unpacked
    logits = wide[:num_rows] @ weight
    del hidden, wide
    return logits * 2.0


def test_it_tells_tokens_rows_and_the_rest_apart():
    weight = torch.ones(2, VOCAB + 1)[:, :VOCAB]  # A view: not as wide as it looks, and never the step's.
    for device in ("cpu", "meta"):
        meter = WorkspaceMeter()
        for num_tokens in (4, 9):
            logits = meter.run(functools.partial(step, weight.to(device), num_tokens, 2, device), num_tokens)
            assert logits.shape == (2, VOCAB)
        found = meter.workspace()
        assert (found.vocab_size, found.token_bytes) == (VOCAB, 3 * 4)
        assert found.row_bytes >= 2 * 4 * VOCAB


def test_the_trial_and_the_plan_see_the_same_step(monkeypatch):
    """The trial measures packed steps with weights, plan forwards without any."""
    found, make_room = [], trial.Engine.make_room
    monkeypatch.setattr(trial.Engine, "make_room", lambda self, seen: (found.append(seen), make_room(self, seen)))
    for name in ("llama", "gpt2", "mistral", "gemma3_text"):
        paged = zoo.build(name, "paged")  # A model that no test has tried before.
        paged.generate(**zoo.prompts([5], 0), max_new_tokens=2, pad_token_id=0)
        planned = footprint(paged.config, torch.float32).workspace
        measured = found.pop()
        assert planned.row_bytes == measured.row_bytes == 4 * zoo.VOCAB
        assert 0.8 * measured.token_bytes <= planned.token_bytes <= 1.25 * measured.token_bytes
        assert registry.pools_under(paged)[0].engines
