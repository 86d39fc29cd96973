"""A runner comes in by registration, and what it may rely on holds: captured inputs are those of later steps."""

import functools
import time

import pytest
import torch

import hf_paged
from hf_paged.execution import model_runner
from hf_paged.execution.model_runner import ModelRunner, register_runner
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.models import registry
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare, pair
from support.threads import in_threads


@pytest.fixture
def registered(monkeypatch):
    """Registers kinds of runners until the test ends."""
    monkeypatch.setattr(model_runner, "_kinds", list(model_runner._kinds))
    return register_runner


def tensors_of(inputs) -> list[torch.Tensor]:
    tensors = [inputs.input_ids, inputs.position_ids, inputs.sample_index]
    for _, metadata in inputs.layers.values():
        tensors += [tensor for tensor in vars(metadata).values() if isinstance(tensor, torch.Tensor)]
    return tensors


class ReplayingRunner(ModelRunner):
    """Keeps a forward over the inputs of the first step of each shape, and calls that for later ones.

    As a graph does, it never looks at the tensors of a later step: only at shapes, and at the addresses of what it has
    captured. The logits go to a buffer of its own, and their copy to the caller.
    """

    def __init__(self, pool):
        super().__init__(pool)
        self.captured, self.num_replays = {}, 0

    def execute(self, model, inputs):
        key = tuple((tensor.shape, tensor.data_ptr()) for tensor in tensors_of(inputs))
        if key not in self.captured:
            output = torch.empty(0)
            logits = super().execute(model, inputs)
            replay = functools.partial(super().execute, model, inputs)
            self.captured[key] = (replay, output.resize_(logits.shape))  # Whole: an interrupt may come at any line.
            return logits
        self.num_replays += 1
        replay, output = self.captured[key]
        output.copy_(replay())
        return output.clone()


def runner_of(model) -> ModelRunner:
    return registry.engine_of(model).runner


@pytest.mark.usefixtures("is_ahead")
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_replayed_steps_give_the_tokens_of_dense(name, options, registered):
    registered(ReplayingRunner)
    models = pair(name=name)
    hf_paged.release(models[1])
    for seed in range(2):
        compare(models, zoo.prompts([13, 4, 30, 9, 21, 1], seed=seed), **options)
    runner = runner_of(models[1])
    assert type(runner) is ReplayingRunner
    assert runner.num_replays > LENGTHS["max_new_tokens"], "hardly a step was replayed"


def test_logits_that_a_call_was_given_stay_while_the_next_step_runs(registered, monkeypatch):
    """Calls with a slow processor sample in their own threads. These sleep first, so that they take turns."""
    registered(ReplayingRunner)
    dense, paged = pair(token_budget=64)
    hf_paged.release(paged)
    options = {**LENGTHS, "min_new_tokens": 20, "no_repeat_ngram_size": 30}
    prompts = [zoo.prompts([9], seed=seed) for seed in range(2)]
    expected = [dense.generate(**inputs, **options) for inputs in prompts]
    choose, first_naps = GenerateCall.choose, iter([0.04, 0.06])

    def choose_late(self, requests, logits):
        time.sleep(0.04 if self.has_begun else next(first_naps))
        return choose(self, requests, logits)

    monkeypatch.setattr(GenerateCall, "choose", choose_late)
    got = in_threads(*(lambda inputs=inputs: paged.generate(**inputs, **options) for inputs in prompts))
    for want, output in zip(expected, got):
        assert torch.equal(want, output)
    assert runner_of(paged).num_replays


def test_a_kind_serves_the_pools_that_it_says(registered):
    class Nowhere(ModelRunner):
        @classmethod
        def serves(cls, pool):
            return False

    registered(Nowhere)
    models = pair()
    hf_paged.release(models[1])
    compare(models, zoo.prompts([9, 4]))
    assert type(runner_of(models[1])) is ModelRunner
    registered(ReplayingRunner)
    compare(models, zoo.prompts([9, 4]))
    assert type(runner_of(models[1])) is ModelRunner, "an engine keeps its runner"
    hf_paged.release(models[1])
    compare(models, zoo.prompts([9, 4]))
    assert type(runner_of(models[1])) is ReplayingRunner


def test_a_trial_runs_eagerly(registered):
    """It checks all that a captured step would replay unchecked."""

    class Refusing(ModelRunner):
        def execute(self, model, inputs):
            raise AssertionError("the trial is not a step of the engine")

    registered(Refusing)
    model = zoo.build("llama", "paged")
    with pytest.raises(AssertionError, match="not a step of the engine"):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert type(runner_of(model)) is Refusing
