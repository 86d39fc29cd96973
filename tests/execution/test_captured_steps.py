"""Captured decode steps give the tokens of dense, and are dropped, or not used, where a replay would not.

On the CPU they are lists of operators; `test_recorders.py` holds CUDA's graphs against an imitation of its API.
"""

import copy
import functools
import gc
import os
import time
import weakref

import accelerate
import peft
import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria

import hf_paged
from hf_paged import PagedConfig
from hf_paged.execution import captured_steps, op_recorder
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.execution.op_recorder import OpRecorder
from hf_paged.models import registry
from hf_paged.reasons import Reason
from support import zoo
from support.interrupts import Interrupt, InterruptedAt
from support.packing import BLOCK, LENGTHS, SAMPLE, compare
from support.threads import in_threads

RAGGED = [13, 4, 30, 9, 21, 1]
ENDLESS = {"eos_token_id": None}  # All rows are in every step.
# Reasons for which a few steps of any history run eagerly.
USUAL = {Reason.PROMPT_TOKENS.text, Reason.FIRST_USE.text}


def capturing(name="llama", **config):
    """Dense and paged models of the test's own; decode steps of the paged one are captured as lists of operators."""
    models = tuple(copy.deepcopy(model) for model in zoo.pair(name))
    hf_paged.configure(models[1], PagedConfig(**{"block_size": 4, "token_budget": 16, "capture": "ops", **config}))
    return models


def runner_of(model):
    (pool,) = registry.pools_under(model)
    (engine,) = pool.engines
    return engine.runner


def replays(model) -> int:
    return hf_paged.stats(model).replayed_steps


def unusual(model) -> set[str]:
    """The unusual reasons for which steps ran eagerly."""
    return set(hf_paged.stats(model).eager_steps) - USUAL


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "qwen3"))]
)
def test_compiled_steps_give_the_tokens_of_dense(name):
    models = capturing(name, capture="compile")
    compare(models, zoo.prompts([13, 4, 9]), **ENDLESS)
    assert replays(models[1]) > 10 and not unusual(models[1])


def test_a_step_that_the_compiler_refuses_runs_eagerly():
    models = capturing("gpt_oss", capture="compile")
    compare(models, zoo.prompts([13, 4, 9]), **ENDLESS)
    assert not replays(models[1])
    [reason] = unusual(models[1])
    assert reason.startswith("a step could not be captured")


# Tokens.


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt_oss"])
def test_rows_that_enter_and_leave_have_the_tokens_of_dense(name, options):
    models = capturing(name)
    for seed in range(3):
        compare(models, zoo.prompts(RAGGED, seed=seed), **options)
    stats = hf_paged.stats(models[1])
    assert stats.replayed_steps > 2 * LENGTHS["max_new_tokens"]
    assert len(stats.captured_buckets) >= 3 and set(stats.captured_buckets) <= set(captured_steps.BUCKETS)
    assert not unusual(models[1]) and not stats.dropped_captures


def test_a_preempted_row_comes_again():
    models = capturing(memory_budget=14 * BLOCK, prefix_cache=False)
    for seed in range(2):
        compare(models, zoo.prompts([9, 12, 8], seed=seed))
    (engine,) = registry.pools_under(models[1])[0].engines
    assert engine.scheduler.num_preemptions and replays(models[1])


def test_a_prompt_that_is_found_in_the_prefix_cache():
    models = capturing(prefix_cache_share=1)
    for _ in range(3):
        compare(models, zoo.prompts([21, 30]))
    assert hf_paged.stats(models[1]).prefix_hit_tokens and replays(models[1])


def test_contexts_outgrow_their_block_tables():
    models = capturing()
    compare(models, zoo.prompts([9, 4]), max_new_tokens=100, **ENDLESS)
    widths = {size.table_widths for size in runner_of(models[1])._captures.steps}
    assert widths == {(16,), (32,)}


def test_calls_that_come_at_the_same_time():
    dense, paged = capturing()
    prompts = [zoo.prompts([9, 5], seed=0), zoo.prompts([7], seed=1), zoo.prompts([12, 3, 4], seed=2)]
    # Those with a slow processor choose their tokens in their own threads.
    options = [LENGTHS, {**LENGTHS, "no_repeat_ngram_size": 30}, {**LENGTHS, "max_new_tokens": 35}]
    expected = [dense.generate(**inputs, **wanted) for inputs, wanted in zip(prompts, options)]
    for _ in range(2):
        calls = [lambda i=i, w=w: paged.generate(**i, **w) for i, w in zip(prompts, options)]
        for want, got in zip(expected, in_threads(*calls)):
            assert torch.equal(want, got)
    assert replays(paged) and not unusual(paged)


def test_prepacked_weights():
    models = capturing(prepack_weights=True)
    for seed in range(2):
        compare(models, zoo.prompts([9, 30, 4], seed=seed))
    before = replays(models[1])
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.neg_()
    compare(models, zoo.prompts([9, 30, 4], seed=2))
    assert replays(models[1]) > before


# The model changes.


class ChangeAfter(StoppingCriteria):
    """Calls a function when the rows have so many tokens; ends no row."""

    def __init__(self, length, change):
        self.length, self.change = length, change

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            self.change()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def in_place(model):
    model.model.layers[0].mlp.up_proj.weight.neg_()


def by_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()


def replaced(model):
    model.model.layers[1].self_attn.v_proj.weight = torch.nn.Parameter(torch.ones(32, 32))


def attribute(model):
    model.model.norm.variance_epsilon = 10.0


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def adapted(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=32)
    peft.inject_adapter_in_model(config, model)
    model.eval()


CHANGES = [in_place, by_data, replaced, attribute, hooked, adapted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_shows_at_once(change):
    models = capturing()
    inputs = zoo.prompts([9, 4])
    compare(models, inputs, **ENDLESS)
    assert hf_paged.stats(models[1]).captured_buckets == (2,)
    outputs = []
    for model in models:
        criteria = [ChangeAfter(inputs["input_ids"].shape[1] + 8, lambda model=model: change(model))]
        outputs.append(model.generate(**inputs, **LENGTHS, **ENDLESS, stopping_criteria=criteria))
    assert torch.equal(*outputs)
    stats = hf_paged.stats(models[1])
    assert stats.eager_steps[Reason.CHANGED_MODEL.text] > 5
    assert stats.dropped_captures == {Reason.OTHER_MODEL.text: 1} and not stats.captured_buckets


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_calls_shows_at_once(change):
    models = capturing()
    compare(models, zoo.prompts([9, 4]))
    before = replays(models[1])
    for model in models:
        change(model)
    for seed in range(2):
        compare(models, zoo.prompts([9, 4], seed=seed))
    if change is hooked:
        assert replays(models[1]) == before and unusual(models[1]) == {Reason.UNSEEN_CHANGES.text}
    else:
        assert replays(models[1]) > before and not unusual(models[1])


def test_hooks_of_accelerate_run():
    models = capturing()
    for model in models:
        accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
    compare(models, zoo.prompts([9, 4]))
    assert not replays(models[1]) and unusual(models[1]) == {Reason.MOVED_INPUTS.text}


MODES = {
    "of torch": (BaseTorchFunctionMode, Reason.MODES),
    "of a counter": (functools.partial(FlopCounterMode, display=False), Reason.UNSEEN_CHANGES),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_sees_eager_steps(name):
    """A replayed graph would pass it by."""
    mode, reason = MODES[name]
    models = capturing()
    compare(models, zoo.prompts([9]))
    before = replays(models[1])
    with mode():
        compare(models, zoo.prompts([9]))
    assert replays(models[1]) == before and unusual(models[1]) == {reason.text}
    compare(models, zoo.prompts([9]))
    assert replays(models[1]) > before


def test_a_default_device_is_no_obstacle():
    models = capturing()
    with torch.device("cpu"):
        compare(models, zoo.prompts([9]))
    assert replays(models[1])


@pytest.mark.parametrize("reason", [Reason.OTHER_SETTINGS, Reason.MOVED_PAGES], ids=lambda reason: reason.name)
def test_what_a_recording_holds_is_looked_at_before_each_step(reason, monkeypatch):
    models = capturing()
    compare(models, zoo.prompts([9]))
    if reason is Reason.OTHER_SETTINGS:
        monkeypatch.setattr(captured_steps, "_settings", lambda: "others")
    else:
        (pool,) = registry.pools_under(models[1])
        for group in pool.groups.values():
            for storage in group.layers.values():
                storage.pages = tuple(page[:64].clone() for page in storage.pages)
    compare(models, zoo.prompts([9]))
    assert hf_paged.stats(models[1]).dropped_captures == {reason.text: 1}


# What cannot be captured.


def test_a_model_that_reads_a_value_on_the_host_runs_eagerly():
    """GPT-2 looks for pads among its tokens."""
    models = capturing("gpt2")
    compare(models, zoo.prompts(RAGGED))
    compare(models, zoo.prompts(RAGGED))
    (reason,) = unusual(models[1])
    assert reason.startswith("the model reads what it has computed on the host")
    assert not replays(models[1])


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_size_that_cannot_be_captured_runs_eagerly(error, monkeypatch):
    models, record, tried = capturing(), OpRecorder.record, []

    def fails_for_two_rows(self, function):
        tried.append(function.args[1].input_ids.shape[1])
        if tried[-1] == 2:
            raise error("the device refuses")
        return record(self, function)

    monkeypatch.setattr(OpRecorder, "record", fails_for_two_rows)
    for seed in range(2):
        compare(models, zoo.prompts([9, 4], seed=seed))
        compare(models, zoo.prompts([9], seed=seed))
    assert tried == [2, 2, 1], "each size is tried until its error has come twice"
    assert unusual(models[1]) == {Reason.FAILED_CAPTURE.of(error.__name__).text}
    assert hf_paged.stats(models[1]).captured_buckets == (1,)


def test_an_error_of_the_model_is_no_error_of_the_capture(monkeypatch):
    models, forward = capturing(), ModelRunner.forward
    compare(models, zoo.prompts([9]))
    fails = True

    def forward_that_fails(self, model, inputs):
        if fails and inputs.input_ids.shape[1] == 2:
            raise ValueError("of the model")
        return forward(self, model, inputs)

    monkeypatch.setattr(ModelRunner, "forward", forward_that_fails)
    for _ in range(2):  # At the first use of a size, and when it would be captured.
        with pytest.raises(ValueError, match="of the model"):
            models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
    fails = False
    compare(models, zoo.prompts([9, 4]), **ENDLESS)
    assert hf_paged.stats(models[1]).captured_buckets == (1, 2) and not unusual(models[1])


def test_an_error_of_a_signal_handler_reaches_its_call(monkeypatch):
    models, record, errors = capturing(), OpRecorder.record, [TimeoutError("too late")]

    def interrupted(self, function):
        if errors:
            raise errors.pop()
        return record(self, function)

    monkeypatch.setattr(OpRecorder, "record", interrupted)
    with pytest.raises(TimeoutError, match="too late"):
        models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
    compare(models, zoo.prompts([9, 4]))
    assert replays(models[1]) and not unusual(models[1])


def test_an_interrupt_at_any_line_of_a_capture_leaves_nothing(monkeypatch):
    models = capturing()
    compare(models, zoo.prompts([9, 4]))
    record, lines = OpRecorder.record, []

    def count(self, function):
        with InterruptedAt(None) as counting:
            recording = record(self, function)
        lines.append(counting.num_lines)
        return recording

    def interrupted(self, function):
        with InterruptedAt(countdowns.pop()):
            return record(self, function)

    monkeypatch.setattr(OpRecorder, "record", count)
    hf_paged.release(models[1])
    compare(models, zoo.prompts([9, 4]))
    monkeypatch.setattr(OpRecorder, "record", interrupted)
    for countdown in range(1, lines[0], max(1, lines[0] // 25)):
        hf_paged.release(models[1])
        countdowns = [None, countdown]
        with pytest.raises(Interrupt):
            models[1].generate(**zoo.prompts([9, 4]), **LENGTHS)
        assert not hf_paged.stats(models[1]).captured_buckets
        assert torch.equal(*(model.generate(**zoo.prompts([9, 4]), **LENGTHS) for model in models))
        assert hf_paged.stats(models[1]).captured_buckets == (2,)


def test_an_interrupt_at_any_line_of_a_call_costs_that_call_alone():
    models, inputs = capturing(), zoo.prompts([9, 4])
    expected = compare(models, inputs)
    with InterruptedAt(None) as counting:
        models[1].generate(**inputs, **LENGTHS)
    for countdown in range(1, counting.num_lines, counting.num_lines // 40):
        if countdown % 2:  # Interrupts of first uses and captures; else of replays.
            runner_of(models[1]).drop(Reason.DISABLED)
        with pytest.raises(Interrupt), InterruptedAt(countdown):
            models[1].generate(**inputs, **LENGTHS)
        assert torch.equal(models[1].generate(**inputs, **LENGTHS), expected)
    assert not unusual(models[1])


def test_a_replay_that_differs_from_the_model_is_not_used_again(monkeypatch):
    models = capturing()
    replay = op_recorder.OpRecording.replay
    monkeypatch.setattr(op_recorder.OpRecording, "replay", lambda self: self.__dict__.setdefault("old", replay(self)))
    compare(models, zoo.prompts([9, 4]))
    assert replays(models[1]) == 1, "the first one has the inputs that it was captured with"
    assert unusual(models[1]) == {Reason.OTHER_LOGITS.text}


def test_steps_of_many_rows_run_eagerly(monkeypatch):
    monkeypatch.setattr(captured_steps, "BUCKETS", (1, 2))
    models = capturing()
    compare(models, zoo.prompts([9, 4, 5]))
    assert unusual(models[1]) == {Reason.MANY_ROWS.text}


def test_no_graph_is_captured_while_other_threads_draw(monkeypatch):
    monkeypatch.setattr(OpRecorder, "must_be_alone", True)
    dense, paged = capturing()
    options = {**LENGTHS, "no_repeat_ngram_size": 30}
    prompts = [zoo.prompts([9], seed=seed) for seed in range(2)]
    expected = [dense.generate(**inputs, **options) for inputs in prompts]
    choose = hf_paged.generation.generate_call.GenerateCall.choose

    def choose_late(self, requests, logits):
        time.sleep(0.03)
        return choose(self, requests, logits)

    monkeypatch.setattr(hf_paged.generation.generate_call.GenerateCall, "choose", choose_late)
    got = in_threads(*(lambda inputs=inputs: paged.generate(**inputs, **options) for inputs in prompts))
    assert all(map(torch.equal, expected, got))
    assert Reason.OTHERS_DRAW.text in unusual(paged)


# Padded steps.


def test_captured_steps_keep_their_addresses(monkeypatch):
    places, prepare = {}, captured_steps.prepare_inputs

    def watched(chunks, groups, buffers, padded_to):
        inputs = prepare(chunks, groups, buffers, padded_to)
        metadata = [metadata for _, metadata in inputs.layers.values()]
        tensors = [inputs.input_ids, *(value for part in metadata for value in vars(part).values())]
        addresses = [value.data_ptr() for value in tensors if isinstance(value, torch.Tensor)]
        assert places.setdefault(id(buffers), addresses) == addresses
        return inputs

    monkeypatch.setattr(captured_steps, "prepare_inputs", watched)
    models = capturing()
    for seed in range(2):
        compare(models, zoo.prompts(RAGGED, seed=seed))
    assert len(places) == len(hf_paged.stats(models[1]).captured_buckets)


# Memory.


def test_the_size_that_was_used_longest_ago_makes_room(monkeypatch):
    monkeypatch.setattr(captured_steps, "MAX_CAPTURES", 2)
    models = capturing()
    for lengths in ([9], [9, 4], [9], [9, 4, 5]):
        compare(models, zoo.prompts(lengths), **ENDLESS)
    stats = hf_paged.stats(models[1])
    assert stats.captured_buckets == (1, 4)
    assert stats.dropped_captures == {Reason.RARELY_USED.text: 1}


@pytest.mark.parametrize("end", ["release", "configure", "disable", "the model's"])
def test_recordings_end_with(end):
    models = list(capturing())
    compare(models, zoo.prompts([9, 4]), **ENDLESS)
    held = [weakref.ref(step.recording) for step in runner_of(models[1])._captures.steps.values()]
    assert held
    if end == "release":
        hf_paged.release(models[1])
    elif end == "configure":
        hf_paged.configure(models[1], PagedConfig())
    elif end == "disable":
        hf_paged.disable()
        assert hf_paged.stats(models[1]).dropped_captures == {Reason.DISABLED.text: 1}
        hf_paged.enable()
    else:
        model = weakref.ref(models.pop())
        gc.collect()
        assert model() is None
    assert [recording() for recording in held] == [None]


def test_a_forked_child_captures_its_own():
    models = capturing()
    expected = compare(models, zoo.prompts([9, 4]))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            has_none = not hf_paged.stats(models[1]).captured_buckets
            is_equal = torch.equal(models[1].generate(**zoo.prompts([9, 4]), **LENGTHS), expected)
            code = 0 if has_none and is_equal and hf_paged.stats(models[1]).captured_buckets else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert hf_paged.stats(models[1]).captured_buckets


def test_nothing_is_captured_on_a_cpu_by_default():
    models = capturing(capture="auto")
    compare(models, zoo.prompts([9, 4]))
    stats = hf_paged.stats(models[1])
    assert not stats.replayed_steps and not stats.eager_steps and not stats.captured_buckets
    assert not runner_of(models[1]).needs_identity


def test_logits_belong_to_the_caller(monkeypatch):
    """Graphs put theirs into one tensor for all."""
    models, replay, results = capturing(), op_recorder.OpRecording.replay, {}

    def into_one_tensor(self):
        logits = replay(self)
        return results.setdefault(logits.shape, torch.empty_like(logits)).copy_(logits)

    monkeypatch.setattr(op_recorder.OpRecording, "replay", into_one_tensor)
    run, given = captured_steps.CapturedRunner.run, []

    def watched(self, *arguments):
        logits = run(self, *arguments)
        given.append((logits, logits.clone()))
        return logits

    monkeypatch.setattr(captured_steps.CapturedRunner, "run", watched)
    compare(models, zoo.prompts([9]))
    assert replays(models[1]) > 5
    assert all(torch.equal(logits, then) for logits, then in given)


# A device that is not the CPU.


def test_steps_that_are_captured_on_a_device(fake_device, monkeypatch):
    """Rows run ahead of their tokens there: a replay takes them on the device, and waits for nothing."""
    dense, paged = capturing()
    inputs = zoo.prompts(RAGGED)
    expected = dense.generate(**inputs, **LENGTHS)
    paged = paged.to(fake_device.device)
    moved = {name: tensor.to(fake_device.device) for name, tensor in inputs.items()}
    traffics, replay = [], captured_steps.CapturedRunner._replay

    def watched(self, step, *arguments):
        with fake_device.watch() as traffic:
            logits = replay(self, step, *arguments)
        if step.num_replays > 2:  # Not the one that is compared with the model.
            traffics.append(traffic)
        return logits

    monkeypatch.setattr(captured_steps.CapturedRunner, "_replay", watched)
    for _ in range(2):
        assert torch.equal(paged.generate(**moved, **LENGTHS).cpu(), expected)
    assert replays(paged) and not unusual(paged)
    assert runner_of(paged).is_asynchronous
    assert traffics and not any(traffic.downloads or traffic.waits for traffic in traffics)
    # The step, and once in a while which of the tokens on the device belong to which rows.
    assert {traffic.uploads for traffic in traffics} == {1, 2}
