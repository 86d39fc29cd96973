"""The digest that names a model in files: every byte of its content counts, and nothing of this process does."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from hf_paged.models import content_digest as digests
from support import zoo


def digest(model, fingerprint=b"now"):
    digests._known.pop(model, None)
    return digests.content_digest(model, fingerprint)


@pytest.mark.parametrize("name", [*zoo.NAMES, "qwen2_moe"])
def test_a_model_that_is_made_again_has_the_same_one(name):
    first, second = (digest(zoo.build(name, "paged")) for _ in range(2))
    assert first == second and first.model.endswith(type(zoo.build(name, "paged")).__name__)


def test_a_model_that_was_used_and_moved_has_the_same_one(tmp_path):
    model = zoo.build("llama", "paged")
    before = digest(model)
    model.generate(**zoo.prompts([9]), max_new_tokens=3, pad_token_id=0)
    model.config.use_cache, model.config.eos_token_id, model.config._name_or_path = False, 7, "elsewhere"
    model.generation_config.max_new_tokens = 5
    assert digest(model) == before
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="paged")
    assert digest(loaded) == before


def contents():
    model = zoo.build("gpt_oss", "paged")
    return model, [*model.named_parameters(), *model.named_buffers()]


MODEL, TENSORS = contents()
BEFORE = digest(MODEL)


@settings(max_examples=60)
@given(data=st.data())
def test_every_byte_of_every_tensor_counts(data):
    name, tensor = data.draw(st.sampled_from(TENSORS))
    content = tensor.data.view(-1).view(torch.uint8)
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[place] ^= 1 << bit
    try:
        after = digest(MODEL)
    finally:
        content[place] ^= 1 << bit
    assert after.weights != BEFORE.weights and after.settings == BEFORE.settings, name
    assert digest(MODEL) == BEFORE


def scale(model):
    model.model.layers[1].self_attn.scaling *= 1.5


def retheta(model):
    model.config.rope_parameters["rope_theta"] = 3.0


def train(model):
    model.model.layers[0].train()


def swap_classes(model):
    model.model.layers[0].mlp.__class__ = type("OtherMLP", (type(model.model.layers[0].mlp),), {})


def tie(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def hold_a_tensor(model):
    model.model.layers[0].steering = torch.ones(3)


@pytest.mark.parametrize(
    "change", [scale, retheta, train, swap_classes, tie, hold_a_tensor], ids=lambda it: it.__name__
)
def test_what_no_weight_shows_is_a_setting(change):
    model = zoo.build("llama", "paged")
    before = digest(model)
    change(model)
    assert digest(model).settings != before.settings


def test_adapters_and_their_scales_count():
    model = zoo.build("llama", "paged")
    seen = {digest(model)}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one").eval()
    wrapped.add_adapter("two", config)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for change in (
        lambda: wrapped.set_adapter("one"),
        lambda: wrapped.set_adapter("two"),
        lambda: layers[0].set_scale("two", 3.0),
        lambda: wrapped.base_model.disable_adapter_layers(),
    ):
        change()
        assert digest(model) not in seen
        seen.add(digest(model))
    assert len({found.weights for found in seen}) == 2, "without adapters, and with them"


def test_it_is_computed_once_for_a_fingerprint(monkeypatch):
    model, hashed, hash_tensor = zoo.build("llama", "paged"), [], digests._hash_tensor
    monkeypatch.setattr(digests, "_hash_tensor", lambda tensor: (hashed.append(tensor), hash_tensor(tensor))[1])
    first = digest(model, b"one")
    count = len(hashed)
    assert digests.content_digest(model, b"one") == first and len(hashed) == count
    assert digests.content_digest(model, b"two") == first and len(hashed) == 2 * count


def test_a_tensor_that_is_there_twice_is_hashed_once(monkeypatch):
    model, hashed, hash_tensor = zoo.build("llama", "paged"), [], digests._hash_tensor
    monkeypatch.setattr(digests, "_hash_tensor", lambda tensor: (hashed.append(tensor), hash_tensor(tensor))[1])
    tie(model)
    digest(model)
    assert sum(tensor is model.model.layers[0].mlp.up_proj.weight for tensor in hashed) == 1


def test_tensors_of_any_kind_are_hashed_by_their_bytes():
    def hashed(tensor):
        return digests._hash_tensor(tensor)

    whole = torch.arange(12.0).view(3, 4)
    assert hashed(whole.t()) == hashed(whole.t().contiguous()) != hashed(whole) != hashed(whole.view(4, 3))
    assert hashed(torch.tensor(1.0)) != hashed(torch.tensor(1.0).double())
    assert hashed(torch.zeros(2, dtype=torch.float8_e4m3fn)) != hashed(torch.zeros(2, dtype=torch.int8))
    assert hashed(torch.zeros(0)) != hashed(torch.zeros(0, 1))
    assert len(hashed(torch.tensor([True, False]))) == 32
    one, two = TwoTensor(whole, whole), TwoTensor(whole, whole + 1)
    assert hashed(one) != hashed(two) and hashed(one) == hashed(TwoTensor(whole.clone(), whole.clone()))
    with torch.inference_mode():
        assert hashed(torch.ones(3)) == hashed(torch.ones(3).clone())
