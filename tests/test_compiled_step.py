"""The packed step can be compiled whole: no graph break between the model's call and its logits."""

import pytest
import torch
import torch._dynamo
import zoo
from packing import LENGTHS, compare, pair

import hf_paged


@pytest.fixture
def dynamo():
    """Counters of what was compiled; nothing of it is left for other tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_a_compiled_step_has_no_graph_break(name, dynamo):
    dense, paged = pair(name=name)
    hf_paged.release(paged)  # The engine is made anew, after the model was compiled.
    forward = paged.forward
    paged.forward = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    try:
        compare((dense, paged), zoo.prompts([13, 4, 30, 9, 21, 1]))
    finally:
        paged.forward = forward
    assert dynamo["stats"]["unique_graphs"], "nothing was compiled"
    assert not dynamo["graph_break"]


def test_a_few_graphs_serve_steps_of_every_length(dynamo):
    dense, paged = pair()
    forward = paged.forward
    paged.forward = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    try:
        compare((dense, paged), zoo.prompts([13, 4, 30, 9, 21, 1]))
        compare((dense, paged), zoo.prompts([7, 25, 2, 17]), max_new_tokens=LENGTHS["max_new_tokens"] + 5)
    finally:
        paged.forward = forward
    # Dynamo makes one for a size of 1, and one more when sizes that were equal by chance no longer are.
    assert dynamo["stats"]["unique_graphs"] <= 6
