"""The environment sets the defaults of models that `configure` was not called for, and a wrong value is named."""

import dataclasses
import subprocess
import sys

import pytest

import hf_paged
from hf_paged import PagedConfig, PagedError
from hf_paged.config import VARIABLES
from hf_paged_kernels.switches import is_on
from support import zoo
from support.packing import LENGTHS

GOOD = {
    "HF_PAGED_BLOCK_SIZE": (" 32 ", "block_size", 32),
    "HF_PAGED_MEMORY_BUDGET": ("2MiB", "memory_budget", "2MiB"),
    "HF_PAGED_TOKEN_BUDGET": ("64", "token_budget", 64),
    "HF_PAGED_PREFIX_CACHE": ("Off", "prefix_cache", False),
    "HF_PAGED_PREFIX_CACHE_SHARE": ("0.5", "prefix_cache_share", 0.5),
    "HF_PAGED_PREPACK": ("yes", "prepack_weights", True),
    "HF_PAGED_CACHE_SALT": ("7", "cache_salt", "7"),
    "HF_PAGED_EVICTION_POLICY": ("lru", "eviction_policy", "lru"),
    "HF_PAGED_CAPTURE": ("ops", "capture", "ops"),
    "HF_PAGED_KV_DTYPE": ("int8", "kv_dtype", "int8"),
    "HF_PAGED_KV_DTYPE_WINDOW": ("fp8_e4m3", "kv_dtype_window", "fp8_e4m3"),
    "HF_PAGED_SWAP_SPACE": ("1GiB", "swap_space", "1GiB"),
}
WRONG = {
    "HF_PAGED_BLOCK_SIZE": [("24", "a power of two, at least 4; got 24: try"), ("a lot", "got 'a lot': try 16, 32")],
    "HF_PAGED_MEMORY_BUDGET": [("2 GB!", 'a text such as "512MiB" or "2GB"; got'), ("0", "a positive number of bytes")],
    "HF_PAGED_TOKEN_BUDGET": [("0", "a positive number of tokens; got 0: try 512"), ("1e3", "got '1e3'")],
    "HF_PAGED_PREFIX_CACHE_SHARE": [("1.5", "a number from 0 to 1; got 1.5: try"), ("nan", "got nan")],
    "HF_PAGED_EVICTION_POLICY": [("fifo", "must be one of 'lru'; got 'fifo'")],
    "HF_PAGED_CAPTURE": [("on", "must be one of 'auto', 'off', 'ops', 'compile'; got 'on': leave it out for 'auto'")],
    "HF_PAGED_KV_DTYPE": [("int4", "must be one of 'int8', 'fp8_e4m3'; got 'int4': leave it out for the model's own")],
    "HF_PAGED_KV_DTYPE_WINDOW": [("8", "must be one of 'int8', 'fp8_e4m3'; got 8: leave it out")],
    "HF_PAGED_SWAP_SPACE": [("some", 'a text such as "512MiB" or "2GB"; got'), ("0", "a positive number of bytes")],
}
FIELDS = {variable: field for field, variable in VARIABLES.items()}
CASES = [(variable, *case) for variable, cases in WRONG.items() for case in cases]


def test_every_field_has_a_variable():
    assert list(VARIABLES) == [field.name for field in dataclasses.fields(PagedConfig)]
    assert set(VARIABLES.values()) == set(GOOD)


@pytest.mark.parametrize("variable", GOOD)
def test_a_variable_sets_its_field_alone(variable, monkeypatch):
    text, field, value = GOOD[variable]
    monkeypatch.setenv(variable, text)
    assert PagedConfig.from_environment() == PagedConfig(**{field: value})
    monkeypatch.setenv(variable, " ")
    assert PagedConfig.from_environment() == PagedConfig()


def test_variables_that_do_not_go_together_are_refused(monkeypatch):
    monkeypatch.setenv("HF_PAGED_SWAP_SPACE", "1GiB"), monkeypatch.setenv("HF_PAGED_PREFIX_CACHE", "0")
    with pytest.raises(PagedError, match="HF_PAGED_PREFIX_CACHE, HF_PAGED_SWAP_SPACE cannot be used together: swap_s"):
        PagedConfig.from_environment()


@pytest.mark.parametrize(("variable", "text", "words"), CASES)
def test_a_wrong_value_is_refused_with_its_variable(variable, text, words, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises(PagedError) as caught:
        PagedConfig.from_environment()
    assert str(caught.value).startswith(f"{variable}={text} cannot be used: {FIELDS[variable]} must be ")
    assert words in str(caught.value)


def test_an_unknown_word_of_a_switch_counts_as_on_with_a_warning(monkeypatch):
    monkeypatch.setenv("HF_PAGED_PREPACK", "perhaps")
    with pytest.warns(UserWarning, match="HF_PAGED_PREPACK=perhaps is neither on .* it counts as on"):
        assert PagedConfig.from_environment().prepack_weights


def test_a_switch_may_be_off_by_default(monkeypatch):
    monkeypatch.delenv("HF_PAGED_PREPACK", raising=False)
    assert not is_on("HF_PAGED_PREPACK", default=False) and is_on("HF_PAGED_PREPACK")


def test_a_model_without_a_config_is_paged_as_the_environment_says(monkeypatch):
    monkeypatch.setenv("HF_PAGED_BLOCK_SIZE", "8")
    monkeypatch.setenv("HF_PAGED_PREFIX_CACHE", "no")
    stated, left = zoo.build("llama", "paged"), zoo.build("llama", "paged")
    hf_paged.configure(stated, PagedConfig(token_budget=64))
    for model in (stated, left):
        model.generate(**zoo.prompts([30, 20]), **LENGTHS)
    assert hf_paged.stats(left).block_size == 8 and hf_paged.stats(left).prefix_lookups == 0
    assert hf_paged.stats(stated).block_size == PagedConfig.block_size, "a config of the code is whole"
    assert hf_paged.stats(stated).prefix_lookups == 2


def test_a_wrong_value_costs_a_call_and_no_more(monkeypatch):
    """It is no failure of the model's: once the value is right, calls are packed."""
    monkeypatch.setenv("HF_PAGED_BLOCK_SIZE", "24")
    model = zoo.build("llama", "paged")
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(PagedError, match="^HF_PAGED_BLOCK_SIZE=24 cannot be used: block_size must be a power of"):
            model.generate(**zoo.prompts([9, 4]), **LENGTHS, **options)
    monkeypatch.setenv("HF_PAGED_BLOCK_SIZE", "32")
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    stats = hf_paged.stats(model)
    assert stats.block_size == 32 and stats.packed_calls == 1 and not stats.fallbacks


def test_a_wrong_value_breaks_no_import(monkeypatch):
    for variable in WRONG:
        monkeypatch.setenv(variable, "wrong")
    done = subprocess.run([sys.executable, "-c", "import torch, hf_paged"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
