"""Versions of transformers: too old ones are refused, newer ones than the tested ones check themselves first."""

import threading

import pytest
import torch

import hf_paged
from hf_paged.compat import requirements, symbols
from hf_paged.compat.symbols import Symbol
from hf_paged_integrations.transformers import version_gate
from hf_paged_kernels import ops
from support import zoo


@pytest.fixture
def newer(monkeypatch):
    """The installed transformers takes itself for an untested one. Returns the warnings."""
    said = []
    hf_paged.disable()
    monkeypatch.setattr(requirements, "version", lambda name: "9.0.0")
    monkeypatch.setattr(version_gate.logger, "warning_once", said.append)
    monkeypatch.setattr(version_gate, "_is_open", True)
    monkeypatch.setattr(version_gate, "_has_passed", False)
    monkeypatch.setattr(version_gate, "_refusal", None)
    hf_paged.enable()
    return said


@pytest.fixture
def checks(monkeypatch):
    """The threads in which the self-check has run."""
    run, threads = version_gate.check_paged, []

    def check_paged():
        threads.append(threading.current_thread().name)
        return run()

    monkeypatch.setattr(version_gate, "check_paged", check_paged)
    return threads


def generate(model, **options):
    return model.generate(**zoo.prompts([9, 4]), max_new_tokens=8, do_sample=False, **options)


def test_a_transformers_that_is_too_old_is_refused(monkeypatch):
    hf_paged.disable()
    monkeypatch.setattr(requirements, "version", lambda name: "5.16.1")
    with pytest.raises(hf_paged.PagedError, match=r"needs transformers>=5.17, and 5.16.1 is .* install 'transformers>"):
        hf_paged.enable()
    assert not hf_paged.is_enabled()


@pytest.mark.parametrize("version, is_tested", [("5.17.0", True), ("5.24.1", True), ("5.25.0.dev0", False)])
def test_the_tested_range(version, is_tested, monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: version)
    requirements.check_transformers()
    assert requirements.is_tested() == is_tested


def test_a_tested_version_is_not_checked(checks):
    generate(zoo.build("llama", "paged"))
    assert not checks


def test_a_newer_one_is_checked_once_before_the_first_call(newer, checks):
    hf_paged.enable()
    dense, model = zoo.pair("llama")[0], zoo.build("llama", "paged")
    assert len(newer) == 1 and "9.0.0 is newer than those" in newer[0] and not checks
    for _ in range(2):
        assert torch.equal(generate(model), generate(dense))
        hf_paged.disable()
        hf_paged.enable()
    assert checks == ["hf_paged-check"] and hf_paged.stats(model).packed_calls == 2


def test_models_that_are_not_paged_need_no_check(newer, checks):
    generate(zoo.build("llama", "sdpa"))
    assert not checks


def test_a_forward_without_generate_is_a_call(newer, checks):
    model = zoo.build("llama", "paged")
    model(zoo.prompts([5])["input_ids"], use_cache=True)
    assert len(checks) == 1


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_the_check_is_out_of_the_callers_modes(newer, checks, context):
    model = zoo.build("llama", "paged")
    with context():
        generate(model)
    assert len(checks) == 1


def test_calls_that_come_together_are_checked_once(newer, checks):
    model, results = zoo.build("llama", "paged"), []
    threads = [threading.Thread(target=lambda: results.append(generate(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1 and len(results) == 4 and all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("fault", [lambda query, *_: torch.zeros_like(query), lambda *_: 1 / 0], ids=["wrong", "error"])
def test_a_check_that_fails_refuses_every_call(newer, checks, fault, monkeypatch):
    model = zoo.build("llama", "paged")
    with monkeypatch.context() as broken:
        broken.setattr(ops, "write_and_attend", fault)
        with pytest.raises(hf_paged.PagedError, match=r'self-check fails there: .*"sdpa", or pip install'):
            generate(model)
    with pytest.raises(hf_paged.PagedError, match="self-check fails there"):
        generate(model)
    assert len(checks) == 1
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model), generate(zoo.pair("llama")[0]))


def test_a_newer_one_without_a_name_that_is_relied_on_is_refused(monkeypatch):
    hf_paged.disable()
    gone = Symbol("transformers.generation.utils", "GenerationMixin._gone")
    monkeypatch.setattr(symbols, "SYMBOLS", (*symbols.SYMBOLS, gone))
    requirements.check_transformers()  # The tests look at those of a tested one.
    monkeypatch.setattr(requirements, "version", lambda name: "9.0.0")
    with pytest.raises(hf_paged.PagedError, match=r"9.0.0 .* relies on: .*GenerationMixin._gone. Install a newer"):
        hf_paged.enable()
    assert not hf_paged.is_enabled()
