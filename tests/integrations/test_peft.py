"""PEFT's adapters on a "paged" model: the tokens of sdpa, from packed steps wherever all rows have the same adapter."""

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

import hf_paged
from hf_paged import PagedConfig
from hf_paged.cli.doctor.known_pairs import known_trouble
from support import zoo
from support.packing import SAMPLE, compare
from support.parity import PageReads, assert_generates_equal

PROMPTS = zoo.prompts([21, 10, 13])
LM = {"task_type": TaskType.CAUSAL_LM}
# Weights that do something from the start; keys and values depend on them.
LORA = {**LM, "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}


def adapted(implementation: str, *names: str, **options) -> PeftModel:
    """A tiny llama with LoRA adapters of these names; their weights depend on nothing else."""
    model = zoo.build("llama", implementation)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(**{**LORA, **options})
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    return model.eval()


@pytest.fixture
def pair():
    """Dense and paged, both with the adapters "one" and "two"; "one" is active."""
    dense, paged = adapted("sdpa", "one", "two"), adapted("paged", "one", "two")
    hf_paged.configure(paged, PagedConfig(block_size=4, token_budget=16))
    return dense, paged


def both(models, method: str, *arguments) -> None:
    for model in models:
        getattr(model, method)(*arguments)


@pytest.mark.parametrize("options", [{}, SAMPLE, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_peft_model_generate(pair, options):
    if "num_beams" in options or "prompt_lookup_num_tokens" in options:
        rows = zoo.prompts([11]) if "prompt_lookup_num_tokens" in options else PROMPTS
        assert_generates_equal(pair, rows, **options)
    else:
        compare(pair, PROMPTS, **options)
    assert hf_paged.stats(pair[1]).block_size == 4
    hf_paged.release(pair[1])
    assert hf_paged.stats(pair[1]).total_blocks == 0


def test_switching_adapters_never_finds_the_states_of_another(pair):
    """The same prompts over and over: whatever is stored of them belongs to the adapter that computed it."""
    answers = {}
    for _ in range(2):
        for name in ("one", "two"):
            both(pair, "set_adapter", name)
            answers[name] = compare(pair, PROMPTS)
            found = hf_paged.stats(pair[1]).prefix_hit_tokens
            compare(pair, PROMPTS)
            assert hf_paged.stats(pair[1]).prefix_hit_tokens > found, "nothing is found again: nothing is proved"
        with pair[0].disable_adapter(), pair[1].disable_adapter():
            answers["none"] = compare(pair, PROMPTS)
    both(pair, "set_adapter", "one")
    for method in ("merge_adapter", "unmerge_adapter"):
        both(pair, method)
        assert torch.equal(compare(pair, PROMPTS), answers["one"])
    assert torch.equal(answers["none"], zoo.pair("llama")[0].generate(**PROMPTS, max_new_tokens=20))
    kinds = {tuple(tokens.flatten().tolist()) for tokens in answers.values()}
    assert len(kinds) == 3, "adapters that change nothing prove nothing"


@pytest.mark.parametrize("place", ["lora_A", "scaling"])
def test_an_adapter_that_is_trained_further(pair, place):
    before = compare(pair, PROMPTS)
    for model in pair:
        for module in model.modules():
            if place == "scaling" and hasattr(module, "set_scale"):
                module.set_scale("one", 3.0)
            elif place == "lora_A" and hasattr(module, "lora_A"):
                module.lora_A["one"].weight.data.mul_(-2.0)  # As an optimizer does it, without a version.
    assert not torch.equal(compare(pair, PROMPTS), before)


def test_an_adapter_for_each_row(pair):
    """Each row gets its own adapter only in the rectangle: these run transformers' loop over the pages."""
    names = ["two", "__base__", "one"]
    assert_generates_equal(pair, PROMPTS, adapter_names=names)
    assert hf_paged.stats(pair[1]).fallbacks == {"adapters are chosen row by row": 1}
    assert_generates_equal(pair, PROMPTS, adapter_names=names, num_beams=2)
    # Equal prompts whose states differ must not be stored once.
    same = {name: rows[:1].expand(3, -1) for name, rows in PROMPTS.items()}
    _, tokens = assert_generates_equal(pair, same, adapter_names=names)
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    hf_paged.release(pair[1])
    compare(pair, PROMPTS)  # The next call is packed again.


def test_adapters_that_begin_inside_the_prompt():
    """Activated LoRA tells its layers where in each row it begins."""
    models = [adapted(name, "one", alora_invocation_tokens=[5, 6]) for name in ("sdpa", "paged")]
    inputs = zoo.prompts([12, 9])
    inputs["input_ids"][:, 7:9] = torch.tensor([5, 6])
    _, tokens = assert_generates_equal(models, inputs)
    assert hf_paged.stats(models[1]).fallbacks == {"adapters are chosen row by row": 1}
    plain = zoo.pair("llama")[0].generate(**inputs, max_new_tokens=24, pad_token_id=0)
    assert tokens.shape != plain.shape or not torch.equal(tokens, plain)


def test_a_model_that_was_paged_before_it_was_adapted():
    """The engine is older than the adapters; merged for good, the model is a plain one again."""
    models = [zoo.build("llama", name) for name in ("sdpa", "paged")]
    plain = compare(models, PROMPTS)
    pefts = []
    for model in models:
        torch.manual_seed(1)
        pefts.append(get_peft_model(model, LoraConfig(**LORA)).eval())
    changed = compare(pefts, PROMPTS)
    assert not torch.equal(changed, plain)
    merged = [model.merge_and_unload() for model in pefts]
    assert torch.equal(compare(merged, PROMPTS), changed)


def test_adapters_by_transformers_own_methods():
    if known_trouble():
        with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
            zoo.build("llama", "sdpa").add_adapter(LoraConfig(**LORA))
        return
    models = [zoo.build("llama", name) for name in ("sdpa", "paged")]
    plain = compare(models, PROMPTS)
    for model in models:
        for seed, name in enumerate(("one", "two")):
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(**LORA), adapter_name=name)
        model.eval()
    answers = [plain]
    for name in ("one", "two", "one"):
        both(models, "set_adapter", name)
        answers.append(compare(models, PROMPTS))
    assert torch.equal(answers[1], answers[3]) and not torch.equal(answers[1], answers[2])
    both(models, "disable_adapters")
    assert torch.equal(compare(models, PROMPTS), plain)


def test_adapters_from_disk_on_an_offloaded_model(tmp_path):
    zoo.pair("llama")[0].save_pretrained(tmp_path / "model")
    saved = adapted("sdpa", "default")
    for config in saved.peft_config.values():
        config.base_model_name_or_path = str(tmp_path / "model")
    saved.save_pretrained(tmp_path / "adapter")
    dense = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="sdpa").eval()
    paged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="paged").eval()
    compare((dense, paged), PROMPTS)
    offloaded = cpu_offload(paged, execution_device=torch.device("cpu"))
    assert paged.device.type == "meta"
    compare((dense, offloaded), PROMPTS)


OTHERS = {
    "ia3": (IA3Config(**LM, target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False), None),
    "prompt tuning": (PromptTuningConfig(**LM, num_virtual_tokens=5), "the model has its own prepare_inputs"),
    # The cache is PEFT's own, filled before the first token, and dense.
    "prefix tuning": (PrefixTuningConfig(**LM, num_virtual_tokens=5), "its own cache"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters(kind):
    config, obstacle = OTHERS[kind]
    models = []
    for implementation in ("sdpa", "paged"):
        torch.manual_seed(0)
        models.append(get_peft_model(zoo.build("llama", implementation), config).eval())
        for name, parameter in models[-1].named_parameters():
            if "prompt_encoder" in name:
                torch.nn.init.normal_(parameter)
    if obstacle is None:
        compare(models, PROMPTS)
    elif known_trouble():  # `hf-paged doctor` says so: dense models answer otherwise with a cache than without.
        arguments = {**PROMPTS, "max_new_tokens": 12, "pad_token_id": 0}
        cached, whole = (models[0].generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
        assert cached.shape != whole.shape or not torch.equal(cached, whole)
    elif obstacle == "its own cache":
        arguments = {**PROMPTS, "max_new_tokens": 12, "pad_token_id": 0}
        assert torch.equal(models[0].generate(**arguments), models[1].generate(**arguments))
        assert hf_paged.stats(models[1]).total_blocks == 0
    else:
        with PageReads(models[1]):
            assert_generates_equal(models, PROMPTS)
        fallbacks = hf_paged.stats(models[1]).fallbacks
        assert [reason.startswith(obstacle) for reason in fallbacks] == [True]
