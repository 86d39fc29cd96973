"""The packed step can be compiled whole and captured: no graph break, and its metadata stays where it is."""

import pytest
import torch
import torch._dynamo

import hf_paged
from hf_paged.attention.arguments import check_arguments
from hf_paged_evals.models.tiny import tiny_config, tiny_model
from support import zoo
from support.packing import LENGTHS, compare, pair, watch_steps


@pytest.fixture
def dynamo():
    """Counters of what was compiled; nothing of it is left for other tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "gpt2", "gpt_oss"))]
)
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


@pytest.mark.slow
def test_a_few_graphs_serve_steps_of_every_length(dynamo):
    dense, paged = pair()
    forward = paged.forward
    paged.forward = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    try:
        compare((dense, paged), zoo.prompts([13, 4, 30, 9, 21, 1]))
        compare((dense, paged), zoo.prompts([7, 25, 2, 17]), max_new_tokens=LENGTHS["max_new_tokens"] + 5)
    finally:
        paged.forward = forward
    # Dynamo makes one for a size of 1, and one more when sizes that were equal by chance no longer are. After eight
    # it would give up.
    assert dynamo["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_steps_find_their_metadata_at_the_same_addresses(name, monkeypatch):
    def addresses(inputs):
        tensors = [inputs.input_ids, inputs.position_ids, inputs.sample_index]
        for _, metadata in inputs.layers.values():
            tensors += [tensor for tensor in vars(metadata).values() if isinstance(tensor, torch.Tensor)]
        return [tensor.data_ptr() for tensor in tensors if tensor.numel()]

    seen = watch_steps(monkeypatch, addresses)
    compare(pair(name=name), zoo.prompts([13, 4, 30, 9, 21, 1]))
    assert len(seen) > LENGTHS["max_new_tokens"]
    moves = sum(before != after for before, after in zip(seen[-20:], seen[-19:]))
    assert moves <= 1, "only a block table that outgrows its buffer moves"


class Attention(torch.nn.Module):
    """An attention module that hands its keywords on, and adds one of its own."""

    def forward(self, states, tree=None, **kwargs):
        own = {} if tree is None else {"tree_mask": tree}
        check_arguments(self, {**own, **kwargs})
        return states + 1


def test_a_compiled_forward_hands_down_keywords_of_every_name(dynamo):
    compiled = torch.compile(Attention(), fullgraph=True, backend="eager")
    flags = {"output_router_logits": False, "num_items_in_batch": 3, "a_flag_of_the_callers": True}
    assert torch.equal(compiled(torch.zeros(2), **flags), torch.ones(2))


def test_a_compiled_forward_refuses_what_its_attention_adds(dynamo):
    compiled = torch.compile(Attention(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Attention passes tree_mask to its attention function"):
        compiled(torch.zeros(2), tree=torch.ones(3))


@pytest.mark.slow
def test_a_compiled_mixture_of_experts(dynamo):
    """It hands its output_router_logits down to its attention."""
    logits = []
    for implementation in ("sdpa", "paged"):
        model = tiny_model(tiny_config("qwen3_moe", num_hidden_layers=1), implementation)
        compiled = torch.compile(model.forward, backend="eager", dynamic=True)
        with torch.no_grad():
            logits.append(compiled(zoo.prompts([5])["input_ids"]).logits)
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    assert dynamo["stats"]["unique_graphs"], "nothing was compiled"
