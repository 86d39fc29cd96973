"""The prefix cache under `generate`: tokens are found across rows, calls and threads, and equal those of dense."""

import threading

import peft
import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.models.fingerprint import fingerprint
from support import zoo
from support.multimodal import llava
from support.packing import LENGTHS, SAMPLE, compare, pair
from support.parity import assert_rows_equal
from support.prefixes import found, own_pair, prompts

both_ways = pytest.mark.usefixtures("is_ahead")


@both_ways
@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_across_rows_and_calls(name, options):
    models = pair(name=name)
    compare(models, prompts([30, 26, 33, 24]), **options)
    assert found(models[1]) == 24 + 24 + 20, "every row but the first; the last token of a prompt is always run"
    compare(models, prompts([29, 35], seed=1), **options)
    assert found(models[1]) == 68 + 2 * 24
    assert hf_paged.stats(models[1]).prefix_lookups == 6


@both_ways
@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("shared", [4, 8, 12, 16])
def test_beginnings_around_a_window(name, shared):
    """The window is 7 tokens; generated tokens are found, too."""
    models = pair(name=name)
    inputs = prompts([37, 20], shared)
    first = compare(models, inputs, min_new_tokens=20)
    assert found(models[1]) == shared
    compare(models, prompts([shared + 1, 20, 44], shared, seed=2))
    assert found(models[1]) == shared * 4
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 20), value=1)
    compare(models, {"input_ids": first, "attention_mask": mask})
    assert found(models[1]) > shared * 4 + 40


@both_ways
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_a_small_pool_evicts_and_preempts(options):
    models = pair(blocks=22)
    for seed in range(3):
        compare(models, prompts([13, 14, 30, 19, 21, 11] * 2, shared=10, seed=seed), **options)
    stats = hf_paged.stats(models[1])
    assert stats.prefix_hit_tokens and stats.evictions and stats.total_blocks == 22
    assert stats.prefix_lookups > 3 * 12, "no row was preempted"


def test_returned_sequences_are_prefilled_once_and_found_later():
    models = pair()
    for _ in range(2):
        compare(models, prompts([30, 26]), num_return_sequences=3, **SAMPLE)
    assert found(models[1]) == 24 + 28 + 24 and hf_paged.stats(models[1]).prefix_lookups == 4


def test_release_and_configure_drop_it():
    models = pair()
    inputs = prompts([30])
    compare(models, inputs)
    assert hf_paged.stats(models[1]).cached_blocks
    hf_paged.release(models[1])
    compare(models, inputs)
    assert found(models[1]) == 0


def test_switched_off():
    models = pair()
    hf_paged.configure(models[1], PagedConfig(block_size=4, prefix_cache=False))
    compare(models, prompts([30, 26]))
    stats = hf_paged.stats(models[1])
    assert (stats.prefix_lookups, stats.prefix_hit_tokens, stats.cached_blocks) == (0, 0, 0)


def test_salts_separate_calls():
    models, inputs = pair(), prompts([30])
    for expected, salt in [(0, "a"), (0, "b"), (28, "a"), (28, ""), (56, "b")]:
        with hf_paged.cache_salt(salt):
            compare(models, inputs)
        assert found(models[1]) == expected


@both_ways
def test_across_threads():
    dense, paged = pair(token_budget=64)
    paged.generate(**prompts([25], seed=9), **LENGTHS)
    calls = [prompts([26 + seed, 30], seed=seed) for seed in range(6)]
    expected = [dense.generate(**inputs, **LENGTHS) for inputs in calls]
    outputs = [None] * len(calls)

    def run(index):
        outputs[index] = paged.generate(**calls[index], **LENGTHS)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for inputs, want, got in zip(calls, expected, outputs):
        assert_rows_equal(dense, inputs, want, got)
    assert found(paged) >= 24 * 12


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**zoo.prompts([9]), labels=zoo.prompts([9])["input_ids"]).loss.backward()
    optimizer.step()


def edit(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)


def edit_a_column(model):
    model.get_input_embeddings().weight.data[:, 5] += 2.0


def load(model):
    with torch.no_grad():
        weights = {name: weight + 0.3 * weight.sign() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)


def replace(model):
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=False).requires_grad_(False)
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, 0.1)


@both_ways
@pytest.mark.parametrize("change", [step, edit, edit_a_column, load, replace], ids=lambda change: change.__name__)
def test_changed_weights_drop_it(change):
    models, inputs = own_pair(), prompts([30, 26])
    before = compare(models, inputs)
    compare(models, inputs)
    hits = found(models[1])
    for model in models:
        change(model)
    after = compare(models, inputs)
    assert found(models[1]) == hits + 24, "only one row of this call finds the other's"
    assert not torch.equal(before, after), "the change was too small to show"
    compare(models, inputs)
    assert found(models[1]) > hits + 24


def test_adapters_switched_and_merged_drop_it():
    """Each with outputs of its own, and back again."""
    models, inputs = own_pair(), prompts([30])
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    wrapped = []
    for model in models:
        torch.manual_seed(0)
        wrapped.append(peft.get_peft_model(model, config, adapter_name="one").eval())
        wrapped[-1].add_adapter("two", config)

    def scale(model):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("one", 3.0)

    changes = [
        *(lambda model: None, lambda model: model.set_adapter("two"), lambda model: model.set_adapter("one")),
        *(scale, lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
        lambda model: model.base_model.disable_adapter_layers(),
    ]
    outputs = []
    for change in changes:
        for model in wrapped:
            change(model)
        hits = found(models[1])
        outputs.append(compare(wrapped, inputs))
        assert found(models[1]) == hits, "blocks of another adapter were found"
        compare(wrapped, inputs)
        assert found(models[1]) == hits + 28
    different = {tuple(output[0].tolist()) for output in outputs}
    assert len(different) == 4, "one, two, one with another scale (merged and not), none"


def test_learned_prompts_are_not_packed():
    """PEFT puts them before the tokens by a `prepare_inputs_for_generation` on the model itself."""
    models, inputs, outputs = own_pair(), prompts([30]), []
    for model in models:
        wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
        for name, weight in wrapped.named_parameters():
            if "prompt" in name:
                torch.nn.init.constant_(weight, 0.7)
        outputs.append(wrapped.eval().generate(**inputs, **LENGTHS))
    assert torch.equal(*outputs)
    assert list(hf_paged.stats(models[1]).fallbacks) == ["the model has its own prepare_inputs_for_generation"]


def test_under_a_forward_hook_nothing_is_found_or_stored():
    """A hook may change what it does, and nothing shows it: this one steers by a number that the test changes."""
    models, inputs, by = own_pair(), prompts([30]), {"how much": 0.0}
    compare(models, inputs)
    handles = [
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + by["how much"])
        for model in models
    ]
    outputs = []
    for number in (0.5, -0.5):
        by["how much"] = number
        outputs.append(compare(models, inputs))
    assert not torch.equal(*outputs) and hf_paged.stats(models[1]).prefix_lookups == 1
    for handle in handles:
        handle.remove()
    compare(models, inputs)
    assert found(models[1]) == 28


def test_one_text_with_two_images():
    """The same ids, placeholders and all, with other states behind them."""
    kind, config, inputs = llava()
    models, images = [], [inputs["pixel_values"], -inputs["pixel_values"]]
    for implementation in ("sdpa", "paged"):
        torch.manual_seed(0)
        models.append(kind._from_config(config, attn_implementation=implementation).eval())
    first, second = (
        [model.generate(**{**inputs, "pixel_values": image}, **LENGTHS, min_new_tokens=20) for model in models]
        for image in images
    )
    assert torch.equal(*first) and torch.equal(*second) and not torch.equal(first[0], second[0])
    stats = hf_paged.stats(models[1])
    assert stats.page_reads and (stats.prefix_lookups, stats.cached_blocks) == (0, 0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_whole_forward(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 32}
    models = [zoo.build("llama", implementation, rope_parameters=dict(rope)) for implementation in ("sdpa", "paged")]
    for _ in range(2):
        assert_rows_equal(models[0], prompts([30]), *(model.generate(**prompts([30]), **LENGTHS) for model in models))
    stats = hf_paged.stats(models[1])
    assert stats.fallbacks == {"the rotary frequencies depend on the whole forward": 2}
    assert (stats.prefix_lookups, stats.cached_blocks) == (0, 0)


def holed(ids, model):
    mask = torch.ones_like(ids)
    mask[:, 3:5] = 0
    return {"input_ids": ids, "attention_mask": mask}


OTHER_STATES = {
    "embeddings": lambda ids, model: {"inputs_embeds": -model.get_input_embeddings()(ids)},
    "positions": lambda ids, model: {"input_ids": ids, "position_ids": torch.arange(5, 5 + ids.shape[1])[None]},
    "holes": holed,
}


@pytest.mark.parametrize("case", OTHER_STATES)
def test_what_is_more_than_its_tokens_neither_finds_nor_is_found(case):
    models, ids = pair(), prompts([30])["input_ids"]
    compare(models, {"input_ids": ids})
    outputs = [model.generate(**OTHER_STATES[case](ids, model), **LENGTHS) for model in models]
    assert torch.equal(*outputs)
    stats = hf_paged.stats(models[1])
    assert stats.prefix_lookups == 1 and sum(stats.fallbacks.values()) == 1
    assert torch.equal(*(model.generate(input_ids=ids, **LENGTHS) for model in models)) and found(models[1]) == 28


def test_a_fingerprint_sees_what_can_be_seen_and_says_when_it_cannot():
    model = zoo.build("llama", "paged")
    first = fingerprint(model)
    assert fingerprint(model) == first and len(first) == 32
    model.register_buffer("eight_bits", torch.zeros(9).to(torch.float8_e4m3fn))
    assert fingerprint(model) not in (first, None)
    with torch.inference_mode():
        model.register_buffer("inferred", torch.zeros(3))
    assert fingerprint(model) is not None
    model.to_empty(device="meta")
    assert fingerprint(model) is None
