"""`disable` and `enable` while calls are under way: right tokens or a sentence, never wrong tokens."""

import sys
import threading
import time

import pytest
import torch
from transformers import AttentionMaskInterface

import hf_paged
from support import zoo
from support.packing import LENGTHS

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"return_dict_in_generate": True, "output_logits": True},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture
def models():
    return zoo.build("llama", "sdpa"), zoo.build("llama", "paged")


def tokens(model, mode: str, inputs=None, **options) -> torch.Tensor:
    inputs = zoo.prompts([11, 4]) if inputs is None else inputs
    output = model.generate(**inputs, **LENGTHS, **MODES[mode], **options)
    return getattr(output, "sequences", output)


def break_off() -> None:
    hf_paged.disable()
    hf_paged.enable()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_is_paged_while_hf_paged_is_disabled_says_so(models, mode):
    tokens(models[1], mode)
    hf_paged.disable()
    with pytest.raises(hf_paged.PagedError, match=r"hf_paged is disabled: call hf_paged.enable\(\)"):
        tokens(models[1], mode)
    models[1].set_attn_implementation("sdpa")
    expected = tokens(models[0], mode)
    assert torch.equal(tokens(models[1], mode), expected)
    hf_paged.enable()
    models[1].set_attn_implementation("paged")
    assert torch.equal(tokens(models[1], mode), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_in_which_it_is_disabled_raises(models, mode, layer):
    """Enabled again at once: the mask was made before or after, or not at all."""
    tokens(models[1], mode)
    hook = models[1].model.layers[layer].register_forward_pre_hook(lambda *args: break_off())
    with pytest.raises(hf_paged.PagedError, match=r"disable\(\) was called while Llama.* ran.*run it again"):
        tokens(models[1], mode)
    hook.remove()
    assert torch.equal(tokens(models[1], mode), tokens(models[0], mode))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_forward_in_which_it_stays_disabled_raises(models, mode):
    hook = models[1].model.layers[1].register_forward_pre_hook(lambda *args: hf_paged.disable())
    with pytest.raises(hf_paged.PagedError, match=r"disable\(\) was called while"):
        tokens(models[1], mode)
    hook.remove()


def test_a_mask_that_was_not_made_is_no_mask_that_hides_nothing(models):
    """transformers makes no mask for a name that is not registered: left pads were seen."""
    registered = AttentionMaskInterface._global_mapping
    hook = models[1].model.embed_tokens.register_forward_hook(lambda *args: hf_paged.disable())

    def enabled_again(*args):
        assert "paged" not in registered
        hf_paged.enable()

    models[1].model.layers[0].register_forward_pre_hook(enabled_again)
    with pytest.raises(hf_paged.PagedError, match=r"disable\(\) was called while"), torch.no_grad():
        models[1](**zoo.prompts([11, 4]))
    hook.remove()


def test_masks_of_a_static_cache_are_made_between_the_forwards(models):
    model, prepare = models[1], models[1].prepare_inputs_for_generation

    def disabled_meanwhile(*args, **kwargs):
        hf_paged.disable()
        inputs = prepare(*args, **kwargs)
        hf_paged.enable()
        return inputs

    model.prepare_inputs_for_generation = disabled_meanwhile
    with pytest.raises(hf_paged.PagedError, match=r"disable\(\) was called while"):
        tokens(model, "static")


class Switches:
    """A streamer that calls a function at every token."""

    def __init__(self, function):
        self.function = function

    def put(self, value):
        self.function()

    def end(self):
        pass


@pytest.mark.parametrize("mode", ["greedy", "returned"])
def test_between_two_steps_it_may_be_disabled_and_enabled(models, mode):
    prompt = zoo.prompts([11])
    got = tokens(models[1], mode, prompt, streamer=Switches(break_off))
    assert torch.equal(got, tokens(models[0], mode, prompt)) and hf_paged.stats(models[1]).page_reads > 0
    with pytest.raises(hf_paged.PagedError, match="hf_paged is disabled"):
        tokens(models[1], mode, prompt, streamer=Switches(hf_paged.disable))


def test_threads_get_right_tokens_or_a_sentence(models):
    cases = [(mode, zoo.prompts([11, 4], seed=seed)) for seed in range(3) for mode in MODES]
    expected = [tokens(models[0], *case) for case in cases]
    is_over, wrong, counts = threading.Event(), [], {"right": 0, "refused": 0}

    def call(first):
        for number in range(first, first + 24):
            at = number % len(cases)
            try:
                is_right = torch.equal(tokens(models[1], *cases[at]), expected[at])
                wrong.extend([] if is_right else [cases[at][0]])
                counts["right"] += is_right
            except (hf_paged.PagedError, KeyError) as error:
                counts["refused"] += 1
                if "paged" not in str(error):
                    wrong.append(repr(error))

    def switch():
        while not is_over.is_set():
            time.sleep(0.02)
            break_off()

    threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    switcher = threading.Thread(target=switch)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in (switcher, *threads):
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
    finally:
        is_over.set()
        switcher.join()
        sys.setswitchinterval(interval)
    assert not wrong and sum(counts.values()) == 96
