"""Every switch understands the same words, and says so when it understands none."""

import sys
import warnings

import pytest

import hf_paged_autoload
from hf_paged_integrations import autoload
from hf_paged_kernels import switches
from hf_paged_kernels.cpu import loader

WORDS = {
    **{word: True for word in ("1", "true", "yes", "on", "True", " ON ", "Y", "")},
    **{word: False for word in ("0", "false", "no", "off", "False", " OFF ", "N", "f")},
}


@pytest.mark.parametrize("word", WORDS)
def test_words(word, monkeypatch):
    monkeypatch.setenv("HF_PAGED_NATIVE", word)
    assert switches.is_on("HF_PAGED_NATIVE") == WORDS[word]


def test_a_switch_that_is_not_set_is_on(monkeypatch):
    monkeypatch.delenv("HF_PAGED_NATIVE", raising=False)
    assert switches.is_on("HF_PAGED_NATIVE")


def test_an_unknown_word_is_named_once(monkeypatch):
    monkeypatch.setenv("HF_PAGED_NATIVE", "maybe")
    with pytest.warns(UserWarning, match="HF_PAGED_NATIVE=maybe is neither on .1, true.* nor off .0, false.*as on"):
        assert switches.is_on("HF_PAGED_NATIVE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert switches.is_on("HF_PAGED_NATIVE")


@pytest.mark.parametrize("word", ["false", "No", "off"])
def test_the_kernels_are_off(word, monkeypatch, recwarn):
    for name in ("_library", "_failure"):
        monkeypatch.setattr(loader, name, None)
    monkeypatch.setenv("HF_PAGED_NATIVE", word)
    assert not loader.load() and loader.state().reason == f"HF_PAGED_NATIVE={word} turns them off"
    assert not recwarn.list


@pytest.mark.parametrize("word", WORDS)
def test_zero_code_activation_reads_them_alike(word, monkeypatch):
    monkeypatch.setenv(autoload.SWITCH, word)
    monkeypatch.setattr(sys, "meta_path", finders := list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    before = len(finders)
    hf_paged_autoload.install()
    assert (len(finders) > before) == WORDS[word]
    assert (f"{autoload.SWITCH}={word} is set" == autoload.why_off()) != WORDS[word]
