"""A model that changes while rows run: no call finds later what they store meanwhile."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged.models import registry
from support import zoo
from support.packing import pair
from support.threads import in_threads

LONG = {"max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0, "do_sample": False}


def value_weight(model):
    return model.model.layers[0].self_attn.v_proj.weight


def scaled(model, factor):
    with torch.no_grad():
        value_weight(model).mul_(factor)


def exchanged(model, factor):
    """As averaged weights are swapped in and out: another tensor behind the parameter."""
    weight = value_weight(model)
    kept = model.__dict__.setdefault("kept", weight.data)
    weight.data = kept * factor if factor != 1 else kept


def attention_scaling(model, factor):
    model.model.layers[1].self_attn.scaling = factor / 4


def norm_epsilon(model, factor):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-6 if factor == 1 else 9.0


def hooked(model, factor):
    """A hook of one's own, which is there for a few tokens."""
    if factor == 1:
        model.__dict__.pop("own_hook").remove()
        return
    layer = model.model.layers[0]
    model.__dict__["own_hook"] = layer.register_forward_hook(lambda module, args, output: output + factor)


def adapter(model, factor):
    model.set_adapter("default" if factor == 1 else "other")


def with_adapters(model):
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**options, lora_alpha=32))
    model.add_adapter("other", LoraConfig(**options, lora_alpha=64))
    model.set_adapter("default")
    return model.eval()


CHANGES = {
    "weight written in place": (scaled, (4.0, 0.25)),
    "weight exchanged": (exchanged, (4.0, 1)),
    "attention scaling": (attention_scaling, (4.0, 1)),
    "norm epsilon": (norm_epsilon, (4.0, 1)),
    "hook": (hooked, (3.0, 1)),
    "adapter": (adapter, (4.0, 1)),
}


class Changes(BaseStreamer):
    """Changes a model after its third token and puts it back after its sixteenth."""

    def __init__(self, model, change, factors):
        self.model, self.change, self.factors, self.count = model, change, factors, 0

    def put(self, tokens):
        self.count += 1
        if self.count in (4, 17):  # The first is the prompt.
            self.change(self.model, self.factors[self.count == 17])

    def end(self):
        pass


def models_for(change):
    models = [zoo.build("llama", implementation) for implementation in ("sdpa", "paged")]
    hf_paged.configure(models[1], hf_paged.PagedConfig(block_size=4, token_budget=16))
    return [with_adapters(model) for model in models] if change is adapter else models


@pytest.mark.parametrize("name", CHANGES)
def test_a_chat_goes_on_after_the_model_was_changed_and_put_back(name):
    change, factors = CHANGES[name]
    dense, paged = models_for(change)
    output = paged.generate(**zoo.prompts([9], seed=3), **LONG, streamer=Changes(paged, change, factors))
    following = {"input_ids": output[:, :30], "attention_mask": torch.ones_like(output[:, :30])}
    wanted = dense.generate(**following, **LONG)
    assert torch.equal(paged.generate(**following, **LONG), wanted)
    # The cache is not merely off: what was stored since is found.
    hits = hf_paged.stats(paged).prefix_hit_tokens
    assert torch.equal(paged.generate(**following, **LONG), wanted)
    assert hf_paged.stats(paged).prefix_hit_tokens > hits


@pytest.mark.parametrize("name", ["weight written in place", "attention scaling"])
def test_calls_of_other_threads_store_nothing_meanwhile(name):
    change, factors = CHANGES[name]
    dense, paged = models_for(change)
    prompts = [zoo.prompts([9], seed=seed) for seed in range(3)]
    paged.generate(**prompts[0], **LONG)
    streamer = Changes(paged, change, factors)
    outputs = in_threads(
        lambda: paged.generate(**prompts[0], **LONG, streamer=streamer),
        *(lambda prompt=prompt: paged.generate(**prompt, **LONG) for prompt in prompts[1:]),
    )
    for output in outputs:
        following = {"input_ids": output[:, :30], "attention_mask": torch.ones_like(output[:, :30])}
        assert torch.equal(paged.generate(**following, **LONG), dense.generate(**following, **LONG))


def test_a_model_in_use_is_not_kept_alive_by_what_was_seen_of_it():
    _, paged = pair()
    paged.generate(**zoo.prompts([9]), **LONG)
    (engine,) = next(iter(registry.pools_under(paged))).engines
    assert engine._identity is None
