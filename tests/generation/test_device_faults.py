"""A device that fails: the error reaches every call that it concerns, as it is, and no work is done again on it."""

import time

import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.memory.kv_pool import KVCacheGroup
from hf_paged.models import registry
from hf_paged.sampling.sampler import Sampler
from hf_paged_kernels.faults import is_device_fault, is_out_of_memory
from support import zoo
from support.packing import LENGTHS, compare, pair
from support.threads import in_threads

ILLEGAL = "an illegal memory access was encountered"


def wrapped():
    try:
        raise KeyError("the library that called") from RuntimeError(f"CUDA error: {ILLEGAL}")
    except KeyError as error:
        return error


def accelerator_error():
    """torch's own class, where it has one."""
    return getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: device-side assert triggered")


FAULTS = {
    "torch's class": accelerator_error,
    "no kernel image": lambda: RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    "a library": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    "HIP": lambda: RuntimeError(f"HIP error: {ILLEGAL}"),
    "Triton": lambda: RuntimeError(f"Triton Error [CUDA]: {ILLEGAL}"),
    "wrapped": wrapped,
}
some_faults = pytest.mark.parametrize("fault", ["torch's class", "Triton"])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_from_other_errors(name):
    assert is_device_fault(FAULTS[name]()) and not is_out_of_memory(FAULTS[name]())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a must match"),
        ValueError("CUDA error: said a user"),
        IndexError(),
        TimeoutError(),
    ],
    ids=repr,
)
def test_errors_of_models_and_callers_are_no_faults(error):
    assert not is_device_fault(error) and not is_out_of_memory(error)


def test_memory_that_ran_out_is_no_fault():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert is_out_of_memory(error) and not is_device_fault(error)


def fail(monkeypatch, owner, name, make, when=lambda *args: True, times=10**6):
    """Let a method raise, where `when` says so, so many times. Returns the arguments of its calls from then on."""
    real, calls = getattr(owner, name), []

    def failing(*args):
        if calls or when(*args):
            calls.append(args)
            if len(calls) <= times:
                raise make()
        return real(*args)

    monkeypatch.setattr(owner, name, failing)
    return calls


class Together:
    """Two calls of one row each, which share steps from the second on."""

    def __init__(self):
        self.models = pair(token_budget=64)
        self.prompts = [zoo.prompts([9], seed=seed) for seed in range(2)]
        compare(self.models, self.prompts[0])
        self.engine = registry.engine_of(self.models[1])
        (self.pool,) = registry.pools_under(self.models[1])

    def are_in_step(self, runner, model, chunks, *others) -> bool:
        """Wait in a step of one of them until the other is there as well."""
        for _ in range(500):
            if len(self.engine._state_of) > 1:
                break
            time.sleep(0.01)
        return len(chunks) > 1

    def run(self):
        options = {**LENGTHS, "min_new_tokens": 20}
        return in_threads(
            *(lambda inputs=inputs: self.models[1].generate(**inputs, **options) for inputs in self.prompts)
        )

    def assert_whole(self):
        assert not hf_paged.stats(self.models[1]).used_blocks and not self.engine.is_running
        compare(self.models, self.prompts[1])


@some_faults
def test_a_fault_in_a_step_is_everybodys_who_is_in_it_and_the_step_is_not_run_again(fault, monkeypatch):
    both = Together()
    with monkeypatch.context() as patch:
        calls = fail(patch, ModelRunner, "run", FAULTS[fault], both.are_in_step)
        results = both.run()
    assert all(is_device_fault(result) for result in results), results
    assert len(calls) == 1, "work was done on a device that has failed"
    both.assert_whole()


def test_another_error_of_a_step_is_still_looked_for_call_by_call(monkeypatch):
    """So that the test above can fail."""
    both = Together()
    with monkeypatch.context() as patch:
        calls = fail(patch, ModelRunner, "run", lambda: RuntimeError("the model's own"), both.are_in_step)
        results = both.run()
    assert [str(result) for result in results] == ["the model's own"] * 2 and len(calls) == 3
    both.assert_whole()


@pytest.mark.parametrize("owner, name", [(Sampler, "choose"), (GenerateCall, "choose")], ids=["together", "alone"])
def test_a_fault_while_tokens_are_chosen_is_not_provoked_again(owner, name, monkeypatch):
    models = pair()
    compare(models, zoo.prompts([9]))
    options = {**LENGTHS, **({} if owner is Sampler else {"repetition_penalty": 1.2})}
    with monkeypatch.context() as patch:
        calls = fail(patch, owner, name, accelerator_error)
        with pytest.raises(RuntimeError, match="device-side assert"):
            models[1].generate(**zoo.prompts([9, 4]), **options)
    assert len(calls) == 1 and not hf_paged.stats(models[1]).used_blocks
    compare(models, zoo.prompts([9, 4]))


@some_faults
def test_a_fault_in_the_copies_of_shared_blocks_ends_the_calls_that_wanted_them(fault, monkeypatch):
    models = pair()
    compare(models, zoo.prompts([9]))
    same = {name: tensor.repeat(3, 1) for name, tensor in zoo.prompts([9]).items()}
    with monkeypatch.context() as patch:
        calls = fail(patch, KVCacheGroup, "copy_blocks", FAULTS[fault], lambda group, copies: bool(copies), times=1)
        with pytest.raises(RuntimeError, match=ILLEGAL if fault == "Triton" else "device-side assert"):
            models[1].generate(**same, **LENGTHS)
    assert len([copies for _, copies in calls if copies]) == 1
    compare(models, same)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_trial_reaches_the_caller_and_says_nothing_of_the_model(fault, monkeypatch):
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    with monkeypatch.context() as patch:
        calls = fail(patch, ModelRunner, "try_out", FAULTS[fault])
        with pytest.raises((RuntimeError, KeyError)) as raised:
            models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert is_device_fault(raised.value) and len(calls) == 1, "a trial was made on a device that has failed"
    assert not hf_paged.stats(models[1]).fallbacks
    compare(models, zoo.prompts([9, 4]))


@pytest.mark.parametrize("times", [1, 2])
def test_a_trial_without_memory_is_an_error_and_no_quiet_fallback(times, monkeypatch):
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    with monkeypatch.context() as patch:
        fail(patch, ModelRunner, "try_out", lambda: torch.OutOfMemoryError("CUDA out of memory."), times=times)
        with pytest.raises(torch.OutOfMemoryError):
            models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert not hf_paged.stats(models[1]).fallbacks
    compare(models, zoo.prompts([9, 4]))


def test_a_fault_in_a_call_does_not_make_the_pool_anew(monkeypatch):
    """Though the model looks as if it had changed: the caller learns of the device."""
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    hf_paged.configure(models[1], PagedConfig(block_size=4))
    compare(models, zoo.prompts([9]))
    with monkeypatch.context() as patch:
        patch.setattr(registry, "is_outdated", lambda model, engine: True)
        calls = fail(patch, ModelRunner, "run", accelerator_error)
        with pytest.raises(RuntimeError, match="device-side assert"):
            models[1].generate(**zoo.prompts([9]), **LENGTHS)
    assert len(calls) == 1
