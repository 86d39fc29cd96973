"""The parity checks can fail: each mistake a paged cache could make turns them red."""

import pytest
import torch

import hf_paged
from hf_paged.attention import paged_attention
from hf_paged.cache import padding
from hf_paged.generation import generate_call as call
from hf_paged.reasons import Reason
from hf_paged_integrations.transformers import generate
from hf_paged_kernels import ops
from support import zoo
from support.parity import assert_generates_equal

_READ = ("key_cache", "value_cache", "block_tables", "context_lens", "cu_seqlens_q", "scale")
_OPTIONS = ("window", "softcap", "sinks")
_ARGUMENTS = {
    "paged_attention": ("query", *_READ, *_OPTIONS),
    "write_and_attend": ("query", "key", "value", *_READ[:2], "slot_mapping", *_READ[2:], *_OPTIONS),
}
LOOPS = {"packed": {}, "rectangular": {"num_beams": 2}}


def drop(name):
    return lambda call: call.update({name: None})


def change_scale(call):
    call["scale"] *= 1.1


def drop_first_token(call):
    """Every row's second token stands in for its first one."""
    first = call["block_tables"][:, 0]
    for name in ("key_cache", "value_cache"):
        call[name][first, :, 0] = call[name][first, :, 1]


MUTATIONS = {
    "softcap dropped": ("gemma2", drop("softcap")),
    "window dropped": ("mistral", drop("window")),
    "sinks dropped": ("gpt_oss", drop("sinks")),
    "scale changed": ("llama", change_scale),
    "first token dropped": ("llama", drop_first_token),
}


def check(name, loop):
    """A parity check as every other test makes it. Beams do not run packed."""
    options = {"max_new_tokens": 24, "min_new_tokens": 24, **LOOPS[loop]}
    inputs = zoo.prompts([13, 6, 9])
    inputs["input_ids"][inputs["attention_mask"] == 0] = 5  # The embedding of the usual pad is zero: it hides.
    assert_generates_equal(zoo.pair(name), inputs, **options)


@pytest.fixture(params=LOOPS)
def loop(request):
    for name in zoo.NAMES:
        hf_paged.configure(zoo.pair(name)[1], hf_paged.PagedConfig(block_size=4))
    return request.param


@pytest.mark.parametrize("name, mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrong_kernel_call_is_seen(name, mutate, loop, monkeypatch):
    check(name, loop)
    for op, names in _ARGUMENTS.items():
        monkeypatch.setattr(ops, op, mutated(getattr(ops, op), names, mutate))
    with pytest.raises(AssertionError):
        check(name, loop)


def mutated(op, names, mutate):
    def call(*args):
        arguments = dict(zip(names, args, strict=True))
        mutate(arguments)
        return op(**arguments)

    return call


def test_a_stored_pad_is_seen(loop, monkeypatch):
    check("llama", loop)
    record, init = padding.Padding.record, call.GenerateCall.__init__

    def one_less(mask):
        mask = mask.clone()
        mask[torch.arange(len(mask)), (mask.int().argmax(1) - 1).clamp(min=0)] = True
        return mask

    monkeypatch.setattr(
        padding.Padding,
        "record",
        lambda self, mask, *rest: record(self, mask if mask is None else one_less(mask), *rest),
    )
    monkeypatch.setattr(
        call.GenerateCall,
        "__init__",
        lambda self, ids, valid, *rest, **options: init(self, ids, one_less(valid), *rest, **options),
    )
    with pytest.raises(AssertionError):
        check("llama", loop)


def test_plain_sdpa_in_disguise_is_seen(loop, monkeypatch):
    monkeypatch.setattr(paged_attention, "_obstacle", lambda *args: Reason.OTHER_FORWARD)
    monkeypatch.setattr(generate, "why_not_this_call", lambda *args: Reason.OTHER_FORWARD)
    with pytest.raises(AssertionError, match="sdpa in disguise"):
        check("llama", loop)
