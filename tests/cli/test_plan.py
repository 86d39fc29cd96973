"""hf-paged plan: its numbers are those of the pool and of the dense cache."""

from dataclasses import replace

import pytest
import torch
from transformers import MllamaConfig, MllamaForCausalLM
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

import hf_paged
from hf_paged import PagedConfig
from hf_paged.cli.plan.footprint import footprint
from hf_paged.cli.plan.plan import MIB, Memory, Plan, remedies
from hf_paged.models import registry
from hf_paged_evals.models.tiny import tiny_config, tiny_model
from support import zoo

BATCH, PROMPT, CONTEXT = 3, 2, 30
MODELS = ["llama", "gpt2", "mistral", "gemma3_text", "gpt_oss", "gemma3n_text", "qwen3_next", "deepseek_v3"]
_OWN = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 3,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "deepseek_v3": {  # Latents are cached, and keys and values differ in size.
        "head_dim": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
}


def build(name, implementation):
    if name not in _OWN:
        return zoo.build(name, implementation)
    return tiny_model(tiny_config(name, **_OWN[name]), implementation)


def planned(model, block_size=4, context=CONTEXT):
    return Plan(footprint(model.config, torch.float32), BATCH, context, block_size, torch.float32)


def generate(model, watch=None):
    """Rows that end with `CONTEXT` tokens in the cache: the last new token is returned, never stored."""
    new = CONTEXT - PROMPT + 1
    options = {"logits_processor": [watch]} if watch else {}
    inputs = zoo.prompts([PROMPT] * BATCH)
    output = model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, return_dict_in_generate=True, do_sample=False, **options
    )
    assert output.sequences.shape == (BATCH, CONTEXT + 1)
    return output.past_key_values


class Peaks:
    """The most blocks that each KV cache group has used, by its window."""

    def __init__(self, model):
        self.model, self.blocks = model, {}

    def __call__(self, input_ids, scores):
        for group in self.groups():
            window = group.spec.window
            self.blocks[window] = max(self.blocks.get(window, 0), group.blocks.used_blocks)
        return scores

    def groups(self):
        return [group for pool in registry.pools_under(self.model) for group in pool.groups.values()]


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_bytes_are_those_of_the_pool(name, block_size):
    model = build(name, "paged")
    plan = planned(model, block_size)
    hf_paged.configure(model, PagedConfig(block_size=block_size))
    peaks = Peaks(model)
    cache = generate(model, peaks)
    assert {group.window: plan.blocks(group) for group in plan.footprint.groups} == peaks.blocks
    block_bytes = {g.spec.window: sum(layer.block_bytes for layer in g.layers.values()) for g in peaks.groups()}
    assert {group.window: plan.block_bytes(group) for group in plan.footprint.groups} == block_bytes
    assert plan.kv_bytes == sum(block_bytes[window] * blocks for window, blocks in peaks.blocks.items())
    full = [plan.blocks(group) for group in plan.footprint.groups if group.window is None]
    if len(full) == len(plan.footprint.groups):
        assert hf_paged.stats(model).used_blocks == sum(full)
    del cache


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("formats", [{"kv_dtype": "int8"}, {"kv_dtype": "int8", "kv_dtype_window": "fp8_e4m3"}])
def test_quantised_bytes_are_those_of_the_pool(name, formats):
    model = build(name, "paged")
    plan = replace(planned(model), **formats)
    assert plan.kv_bytes < planned(model).kv_bytes / 2 or name == "gemma3_text"
    hf_paged.configure(model, PagedConfig(block_size=4, **formats))
    peaks = Peaks(model)
    cache = generate(model, peaks)
    block_bytes = {g.spec.window: sum(layer.block_bytes for layer in g.layers.values()) for g in peaks.groups()}
    assert {group.window: plan.block_bytes(group) for group in plan.footprint.groups} == block_bytes
    assert hf_paged.stats(model).bytes_per_token == sum(block_bytes.values()) // 4
    del cache


@pytest.mark.parametrize("window", [2, 4, 5, 6, 9, 40])
def test_windows_of_any_size(window):
    model = zoo.build("mistral", "paged", sliding_window=window)
    hf_paged.configure(model, PagedConfig(block_size=4))
    plan, peaks = planned(model), Peaks(model)
    generate(model, peaks)
    assert peaks.blocks == {window: plan.blocks(plan.footprint.groups[0])}


@pytest.mark.parametrize("name", MODELS)
def test_dense_bytes_and_weights_are_those_of_the_dense_model(name):
    model = build(name, zoo.dense_implementation(name))
    plan = planned(model)
    cache = generate(model)
    attention = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.keys is not None]
    assert plan.dense_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in attention)
    recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [s for layer in recurrent for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    assert plan.batch * plan.footprint.state_bytes == sum(state.nbytes for state in states)
    assert (plan.footprint.state_bytes > 0) == (name == "qwen3_next")
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma3n_text", "qwen3_next"])
def test_the_budget_needed_is_the_smallest_that_a_pool_does_not_outgrow(name):
    model = build(name, "paged")
    assert_smallest_budget(planned(model), model)


def test_layers_that_never_store_count_in_the_budget_as_they_do_in_the_pool():
    options = {
        "cross_attention_layers": [1],
        "num_hidden_layers": 3,
        "head_dim": 8,
    }  # Without an image the second stores nothing.
    text = tiny_config("mllama_text_model", **options)
    model = MllamaForCausalLM._from_config(text, attn_implementation="paged").eval()
    config = MllamaConfig(text_config=text.to_dict())
    plan = Plan(footprint(config, torch.float32), BATCH, CONTEXT, 4, torch.float32)
    assert len(plan.footprint.groups[0].layers) == 2 and plan.footprint.num_paged_layers == 3
    assert_smallest_budget(plan, model)


def assert_smallest_budget(plan, model):
    for budget, is_enough in ((plan.budget_needed, True), (plan.budget_needed - 1, False)):
        assert plan.fits(budget) == is_enough
        hf_paged.configure(model, PagedConfig(block_size=4, memory_budget=budget))
        generate(model)
        groups = Peaks(model).groups()
        assert all(group.blocks.total_blocks == group.budget_blocks for group in groups) == is_enough


def test_numbers_worked_out_by_hand():
    plan = planned(build("gemma3_text", "paged"))
    full, windowed = plan.footprint.groups
    assert (full.window, windowed.window) == (None, 7)
    assert plan.row_blocks(full) == 8  # 30 tokens in blocks of 4.
    assert plan.row_blocks(windowed) == 3  # 7 tokens touch at most 3 blocks of 4.
    assert plan.block_bytes(full) == plan.block_bytes(windowed) == 4 * 2 * (16 + 16) * 4
    assert plan.dense_bytes == 3 * (30 + 6) * 2 * (16 + 16) * 4
    assert plan.empty_bytes(1) == 3 * 2 * 2 * (16 + 16) * 4
    assert replace(plan, context=5).row_blocks(windowed) == 2


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_every_remedy_is_true_and_the_largest(name):
    plan = replace(planned(build(name, "paged")), batch=40, context=300, block_size=64)
    memory = Memory(2**30, 2**30, plan.budget_needed // 3)
    assert not memory.fits(plan)
    found = {remedy.change: remedy for remedy in remedies(plan, memory)}
    dtype, kv_dtype, block, budget, batch, context = found.values()
    assert list(found)[0] == "dtype=torch.bfloat16" and dtype.plan.kv_bytes * 2 == plan.kv_bytes and not dtype.fits
    assert list(found)[1] == 'kv_dtype="int8"' and kv_dtype.plan == replace(plan, kv_dtype="int8")
    assert list(found)[2] == f"block_size={block.plan.block_size}" and block.plan.budget_needed < plan.budget_needed
    mebibytes = -(-plan.budget_needed // MIB)
    assert list(found)[3] == f'memory_budget="{mebibytes}MiB"' and budget.fits and plan.fits(mebibytes * MIB)
    assert batch.fits and not memory.fits(replace(plan, batch=batch.plan.batch + 1))
    assert context.fits and not memory.fits(replace(plan, context=context.plan.context + 1))
    assert list(found)[4:] == [f"a batch of at most {batch.plan.batch}", f"a context of at most {context.plan.context}"]


def test_memory_that_the_machine_lacks_is_no_remedy():
    plan = replace(planned(build("llama", "paged")), batch=1000)
    available = plan.weight_bytes + plan.kv_bytes // 2
    found = {remedy.change.split("=")[0]: remedy.fits for remedy in remedies(plan, Memory(available, available, None))}
    assert not found["memory_budget"] and any(found.values())
    tight = Memory(plan.weight_bytes + plan.kv_bytes, plan.weight_bytes + plan.kv_bytes, plan.kv_bytes)
    assert tight.fits(plan) and not replace(tight, available=tight.available - 1).fits(plan)


def test_the_default_budget_is_what_the_weights_leave():
    plan = planned(build("llama", "paged"))
    assert Memory(plan.weight_bytes + 4000, 10**9, None).budget(plan) == 1000
    assert Memory(plan.weight_bytes - 1, 10**9, None).budget(plan) == 0


def test_a_budget_that_is_taken_at_once_must_be_there_and_does_not_grow():
    """As on a GPU."""
    plan = planned(build("llama", "paged"))
    available = plan.weight_bytes + 2 * plan.budget_needed
    gpu = Memory(available, available, plan.budget_needed, is_taken_at_once=True)
    assert gpu.fits(plan)
    assert not replace(gpu, stated=2 * plan.budget_needed + 1).fits(plan)
    small = replace(gpu, stated=plan.budget_needed - 1)
    assert not small.can_grow(plan) and replace(small, is_taken_at_once=False).can_grow(plan)
