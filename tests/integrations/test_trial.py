"""The trial of a model's packed steps: an error is the model's own only if it comes again."""

import functools
import signal

import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution.model_runner import ModelRunner
from hf_paged_integrations.transformers import trial
from support import zoo
from support.packing import LENGTHS


class Timeout(Exception):
    pass


def packs(model) -> bool:
    """Tell whether the next call is packed."""
    before = hf_paged.stats(model).packed_calls
    model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    return hf_paged.stats(model).packed_calls == before + 1


def failing(monkeypatch, *errors: BaseException):
    """Let the next packed steps that are tried out raise these errors before they do anything."""
    left, plain = list(errors), ModelRunner.try_out

    def fail(*args):
        if left:
            raise left.pop(0)  # In no variable: its traceback would hold it.
        return plain(*args)

    monkeypatch.setattr(ModelRunner, "try_out", fail)


PLACES = {"before the step": (trial, "_run_packed"), "in the step": (ModelRunner, "try_out")}


@pytest.mark.parametrize("place", PLACES)
def test_the_exception_of_a_signal_handler_reaches_the_caller(monkeypatch, place):
    owner, name = PLACES[place]
    model, plain = zoo.build("llama", "paged"), getattr(owner, name)

    def on_alarm(*args):
        raise Timeout

    def interrupted(*args):
        monkeypatch.setattr(owner, name, plain)
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(Timeout):
            model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hf_paged.stats(model).fallbacks == {} and packs(model)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_reaches_the_caller(monkeypatch, kind):
    model = zoo.build("llama", "paged")
    failing(monkeypatch, kind())
    with pytest.raises(kind):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert packs(model)


def test_an_error_that_comes_again_as_another_is_the_callers(monkeypatch):
    model = zoo.build("llama", "paged")
    failing(monkeypatch, Timeout(), ValueError())
    with pytest.raises(Timeout):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert packs(model)


def test_an_error_that_comes_again_is_the_models(monkeypatch):
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    failing(monkeypatch, ValueError(), ValueError())
    assert torch.equal(*(model.generate(**zoo.prompts([9, 4]), **LENGTHS) for model in models))
    assert hf_paged.stats(models[1]).fallbacks == {"a packed step fails in this model (ValueError)": 1}


def test_a_failed_trial_leaves_no_blocks_behind(monkeypatch):
    model = zoo.build("llama", "paged")
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**zoo.prompts([9, 4]), **LENGTHS)
    assert hf_paged.stats(model).used_blocks == 0
    hook.remove()
    assert packs(model)


class Hook:
    """A callable without a qualified name."""

    def __call__(self, module, args):
        return None


def made_by_exec():
    namespace = {}
    exec("def hook(module, args): return None", {"__builtins__": {}}, namespace)
    return namespace["hook"]


HOOKS = {
    "exec": made_by_exec(),
    "partial": functools.partial(lambda number, module, args: None, 1),
    "object": Hook(),
    "builtin": isinstance,
    "number": type("Odd", (Hook,), {"__module__": 5})(),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_any_kind(kind):
    models = [zoo.build("llama", implementation) for implementation in ("sdpa", "paged")]
    hf_paged.configure(models[1], PagedConfig(prefix_cache=False))
    for model in models:
        model.unused = torch.nn.Identity()  # Hooks are looked at, whether they run or not.
        model.unused.register_forward_pre_hook(HOOKS[kind])
    assert torch.equal(*(model.generate(**zoo.prompts([9, 4]), **LENGTHS) for model in models))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks


class Recurrent(torch.nn.Module):
    """Adds a little of what it saw last, which it keeps in an attribute, in a list, or in a buffer."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.attribute, self.several = where, torch.zeros(1), [torch.zeros(1)]
        self.register_buffer("written", torch.zeros(1), persistent=False)

    def forward(self, hidden_states):
        mean = hidden_states.mean()
        if self.where == "attribute":
            before, self.attribute = self.attribute, mean
        elif self.where == "list":
            before, self.several = self.several[0], [mean]
        else:
            before = self.written.clone()
            self.written.fill_(mean)
        return hidden_states + 1e-4 * before


@pytest.mark.parametrize("where, name", [("attribute", "attribute"), ("list", "several[0]"), ("buffer", "written")])
def test_a_model_that_keeps_a_state_in_a_module_is_not_packed(where, name):
    """However little it adds: rows would go on from each other's state."""
    model = zoo.build("llama", "paged")
    model.model.norm = torch.nn.Sequential(model.model.norm, Recurrent(where))
    assert not packs(model)
    (reason,) = hf_paged.stats(model).fallbacks
    assert reason.endswith(f"in a module, not in the cache (model.norm.1.{name})")


def test_what_a_module_computes_once_is_no_state():
    class Lazy(torch.nn.Module):
        table = None

        def forward(self, hidden_states):
            if self.table is None:
                self.table = torch.ones(hidden_states.shape[-1])
            return hidden_states * self.table

    model = zoo.build("llama", "paged")
    model.model.norm = torch.nn.Sequential(model.model.norm, Lazy())
    assert packs(model)
