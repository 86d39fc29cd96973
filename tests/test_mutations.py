"""The parity checks can fail: each mistake a paged cache could make turns them red."""

import pytest
import torch
import zoo
from parity import assert_generates_equal

import hf_paged
from hf_paged import attention, padding

_ARGUMENTS = ("query", "key_cache", "value_cache", "block_tables", "context_lens", "cu_seqlens_q", "scale")
_OPTIONS = ("window", "softcap", "sinks")


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


def check(name):
    """A parity check as every other test makes it."""
    hf_paged.configure(zoo.pair(name)[1], hf_paged.PagedConfig(block_size=4))
    assert_generates_equal(zoo.pair(name), zoo.prompts([13, 6, 9]), max_new_tokens=24, min_new_tokens=24)


@pytest.mark.parametrize("name, mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrong_kernel_call_is_seen(name, mutate, monkeypatch):
    check(name)
    paged_attention = attention.ops.paged_attention

    def mutated(*args):
        call = dict(zip(_ARGUMENTS + _OPTIONS, args, strict=True))
        mutate(call)
        return paged_attention(**call)

    monkeypatch.setattr(attention.ops, "paged_attention", mutated)
    with pytest.raises(AssertionError):
        check(name)


def test_a_stored_pad_is_seen(monkeypatch):
    check("llama")
    record = padding.Padding.record

    def with_one_pad(self, mask, *rest):
        if mask is not None:
            mask = mask.clone()
            mask[torch.arange(len(mask)), (mask.int().argmax(1) - 1).clamp(min=0)] = True
        return record(self, mask, *rest)

    monkeypatch.setattr(padding.Padding, "record", with_one_pad)
    with pytest.raises(AssertionError):
        check("llama")


def test_plain_sdpa_in_disguise_is_seen(monkeypatch):
    monkeypatch.setattr(attention, "_obstacle", lambda *args: "always")
    with pytest.raises(AssertionError, match="sdpa in disguise"):
        check("llama")
