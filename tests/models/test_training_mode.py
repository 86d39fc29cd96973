"""A model in training mode runs packed where it computes what it is asked for, and draws no random numbers."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

import hf_paged
from hf_paged import PagedConfig
from hf_paged.compat.transformers import checkpointing_takes_the_cache
from hf_paged.models import registry
from hf_paged_integrations.transformers import trial
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare, pair

RAGGED = [13, 4, 30, 9, 21, 1]
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
LONG = [40, 40, 37]  # Several blocks of 4 each; two rows begin alike.


@pytest.fixture
def trials(monkeypatch):
    """A list that grows with each trial of a model."""
    seen, make = [], trial.make_engine
    monkeypatch.setattr(trial, "make_engine", lambda *args, **how: (seen.append(how), make(*args, **how))[1])
    return seen


class DropoutByFunction(torch.nn.Module):
    """As many models have it: no module of torch's own shows that there is dropout."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states):
        return torch.nn.functional.dropout(hidden_states, self.p, self.training)


# A fresh pair: what the tests do to its modules is theirs.
def new_pair(name: str = "llama", by_function: float | None = None, **overrides):
    models = [zoo.build(name, implementation, **overrides) for implementation in ("sdpa", "paged")]
    if by_function is not None:  # Foreign code: the prefix cache is out of use with it.
        for model in models:
            model.model.norm = torch.nn.Sequential(model.model.norm, DropoutByFunction(by_function))
    hf_paged.configure(models[1], PagedConfig(block_size=4, token_budget=16))
    return models


def outputs_of(models, inputs=None, **options):
    """Tokens, dense and paged, from one seed; the random numbers end in one state."""
    outputs, states = [], []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(**(inputs or zoo.prompts(RAGGED)), **LENGTHS, **options))
        states.append(torch.get_rng_state())
    assert torch.equal(*outputs) and torch.equal(*states)
    return outputs[1]


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_rows_are_packed_in_training_mode(name, options):
    models = pair(name=name)
    try:
        for model in models:
            model.train()
        compare(models, zoo.prompts(RAGGED), **options)
    finally:
        for model in models:
            model.eval()


def test_toggles_take_one_trial_each_and_keep_the_engine(trials):
    models = new_pair()
    outputs_of(models)
    engines = list(registry.pools_under(models[1])[0].engines)
    for _ in range(3):
        for mode in (True, False):
            for model in models:
                model.train(mode)
            outputs_of(models)
    assert [how["may_draw"] for how in trials] == [True, False]
    assert registry.engine_of(models[1]) in engines
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 7 and not stats.fallbacks and stats.page_reads


def test_a_model_that_is_tried_in_training_mode_first(trials):
    models = new_pair()
    for model in models:
        model.train()
    outputs_of(models)
    for model in models:
        model.eval()
    outputs_of(models)
    for model in models:
        model.train()
    outputs_of(models)
    assert [how["may_draw"] for how in trials] == [False, True], "a trial in one mode says nothing of the other"
    assert hf_paged.stats(models[1]).packed_calls == 3


# (type, overrides of its config, the beginning of the reason): dropout by a module, in attention, by a function.
DROPOUT = {
    "module": ("gpt2", {"resid_pdrop": 0.3}, "the model draws random numbers in training mode (Dropout(p=0.3"),
    "attention": ("llama", {"attention_dropout": 0.3}, "the model draws random numbers in training mode (aten."),
    "function": ("llama", {"by_function": 0.3}, "the model draws random numbers in training mode (aten."),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_a_model_that_draws_random_numbers_runs_transformers_own_loop(kind, trials):
    name, overrides, reason = DROPOUT[kind]
    models = new_pair(name, **overrides)
    for model in models:
        model.eval()
    before = outputs_of(models)
    for model in models:
        model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trial_of_it = trial.make_engine(models[1], models[1].device, may_draw=False)
    assert torch.equal(torch.get_rng_state(), state), "a trial leaves the caller's random numbers alone"
    assert kind == "module" or str(trial_of_it.why).startswith(reason[:40])
    trials.clear()
    for _ in range(3):
        outputs_of(models)
    (found,) = hf_paged.stats(models[1]).fallbacks
    assert found.startswith(reason) and hf_paged.stats(models[1]).fallbacks[found] == 3
    assert len(trials) == (kind != "module"), "a refusal is remembered"
    for model in models:
        model.eval()
    assert torch.equal(outputs_of(models), before)
    assert hf_paged.stats(models[1]).packed_calls == 2


CHANGES = {
    "module": ("gpt2", lambda model, p: setattr(model.transformer.h[1].mlp.dropout, "p", p)),
    "attention": ("llama", lambda model, p: setattr(model.model.layers[1].self_attn, "attention_dropout", p)),
    "function": ("llama", lambda model, p: setattr(model.model.norm[1], "p", p)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_dropout_that_comes_and_goes_is_seen_at_once(kind):
    name, set_dropout = CHANGES[kind]
    models = new_pair(name, by_function=0.0 if kind == "function" else None)
    for model in models:
        model.train()
    for turn in (1, 2):
        packed = 3 * turn - 2
        for p in (0.0, 0.4, 0.0, 0.0):
            for model in models:
                set_dropout(model, p)
            outputs_of(models)
        stats = hf_paged.stats(models[1])
        assert stats.packed_calls == packed + 2 and sum(stats.fallbacks.values()) == turn


def test_one_submodule_in_training_mode_counts():
    models = new_pair("gpt2")
    for model in models:
        outputs = model.transformer.h[1].mlp
        outputs.dropout.p = 0.4
        outputs.train()
    outputs_of(models)
    assert sum(hf_paged.stats(models[1]).fallbacks.values()) == 1
    for model in models:
        model.transformer.h[1].mlp.eval()
    outputs_of(models)
    assert hf_paged.stats(models[1]).packed_calls == 1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_with_and_without_dropout(dropout):
    models = []
    for base in new_pair():
        torch.manual_seed(1)
        lora = LoraConfig(**LORA, task_type=TaskType.CAUSAL_LM, lora_dropout=dropout)
        models.append(get_peft_model(base, lora).train())
    outputs_of(models)
    stats = hf_paged.stats(models[1])
    assert (stats.packed_calls, sum(stats.fallbacks.values())) == ((0, 1) if dropout else (1, 0))


def checkpointing(model, switch: str) -> None:
    """Switch it by the name that the installed transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{switch}")()


def test_gradient_checkpointing_gives_what_dense_gives_and_says_so():
    """Older transformers takes the cache from checkpointed layers: its own loop goes on with single tokens."""
    models = new_pair()
    right = outputs_of(models)
    for model in models:
        model.train()
        checkpointing(model, "enable")
    under_it, stats = outputs_of(models), hf_paged.stats(models[1])
    if checkpointing_takes_the_cache():
        assert not torch.equal(under_it, right)
        (reason,) = stats.fallbacks
        assert reason.startswith("gradient checkpointing keeps layers from their cache")
    else:
        assert torch.equal(under_it, right) and stats.packed_calls == 2 and not stats.fallbacks
    for model in models:
        checkpointing(model, "disable")
    packed = hf_paged.stats(models[1]).packed_calls
    assert torch.equal(outputs_of(models), right) and hf_paged.stats(models[1]).packed_calls == packed + 1


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
}


@pytest.mark.parametrize("prepack", [False, True], ids=["", "prepacked"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_an_optimizer_leaves_no_stale_prefix(kind, adapter, prepack):
    models = new_pair()
    hf_paged.configure(models[1], PagedConfig(block_size=4, token_budget=32, prepack_weights=prepack))
    if adapter:
        for index, model in enumerate(models):
            torch.manual_seed(1)
            models[index] = get_peft_model(model, LoraConfig(**LORA, task_type=TaskType.CAUSAL_LM))
    inputs, answers = zoo.prompts(LONG), []
    inputs["input_ids"][1] = inputs["input_ids"][0]
    optimizers = [OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad]) for model in models]
    for model in models:
        model.train()
    for _ in range(4):
        answers.append(outputs_of(models, inputs).tolist())
        hits = hf_paged.stats(models[1]).prefix_hit_tokens
        outputs_of(models, inputs)
        assert hf_paged.stats(models[1]).prefix_hit_tokens > hits, "nothing is found again: nothing is proved"
        for model, optimizer in zip(models, optimizers):
            model(inputs["input_ids"], labels=inputs["input_ids"], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # Dense and paged train alike, but for rounding: the next comparison is of equal weights.
        with torch.no_grad():
            for theirs, ours in zip(models[0].parameters(), models[1].parameters()):
                theirs.copy_(ours)
    assert len({str(answer) for answer in answers}) > 1, "training must change the answers"
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 8 and not stats.fallbacks and stats.page_reads
