"""The packed loop: rows queue, are preempted and run with those of other calls, and nobody can tell."""

import threading
import time

import pytest
import torch
import zoo
from parity import assert_rows_equal
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_paged
from hf_paged import PagedConfig, binding, engine

LENGTHS = {"max_new_tokens": 20, "pad_token_id": 0}
SAMPLE = {"do_sample": True, "top_k": 30, "temperature": 1.2}
# Bytes of one block of 4 tokens in the tiny llama: 2 layers, 2 heads, keys and values of 16 floats.
BLOCK = 4 * 2 * 2 * 2 * 16 * 4


def pair(blocks: int | None = None, token_budget: int = 16, name: str = "llama"):
    """Dense and paged models; steps of few tokens, so that rows are at different steps at the same time."""
    dense, paged = zoo.pair(name)
    budget = None if blocks is None else blocks * BLOCK
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget=budget, token_budget=token_budget))
    return dense, paged


def compare(models, inputs, **options):
    """Tokens and the final state of the random numbers, dense against packed."""
    outputs, states = [], []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **{**LENGTHS, **options}))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the generator ended in another state"
    assert_rows_equal(models[0], inputs, *outputs)
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls and not stats.fallbacks and stats.page_reads and not stats.gathers
    return outputs[1]


def preemptions(model) -> int:
    return binding.engine_of(model, None).scheduler.num_preemptions


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_rows_at_different_steps(name, options):
    compare(pair(name=name), zoo.prompts([13, 4, 30, 9, 21, 1]), **options)


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
def test_a_batch_larger_than_the_pool_queues_and_is_preempted(options):
    models = pair(blocks=18)
    compare(models, zoo.prompts([13, 4, 30, 9, 21, 1] * 4), **options)
    assert preemptions(models[1]) > 0
    assert hf_paged.stats(models[1]).total_blocks == 18, "the budget was exceeded"


PROCESSORS = {
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 7, "exponential_decay_length_penalty": (5, 1.2)},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8, 9], "begin_suppress_tokens": [10]},
    "nucleus": {"top_p": 0.8, "min_p": 0.01, "renormalize_logits": True},
    "typical": {"typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "remove_invalid_values": True},
    "several_ends": {"eos_token_id": [2, 11, 12, 13]},
    "no_end": {"eos_token_id": None},
    "returned": {"num_return_sequences": 3},
}


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_and_criteria_of_transformers(case, sample):
    options = {**PROCESSORS[case], **(SAMPLE if sample else {})}
    if case == "returned" and not sample:
        pytest.raises(ValueError, zoo.pair("llama")[0].generate, **zoo.prompts([4]), **options)
        return
    compare(pair(blocks=40), zoo.prompts([13, 4, 30, 9, 21, 1]), **options)


def test_equal_prompts_are_prefilled_once(monkeypatch):
    models = pair(token_budget=512)
    compare(models, zoo.prompts([8]), **SAMPLE)
    ran = []
    run_step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda model, step: (ran.append(step.input_ids.numel()), run_step(model, step))[1]
    )
    compare(models, zoo.prompts([30]), num_return_sequences=8, min_new_tokens=20, **SAMPLE)
    assert ran[0] == 30 and set(ran[1:]) == {8}


def test_pads_and_finished_rows_are_not_computed(monkeypatch):
    models = pair(token_budget=512)
    compare(models, zoo.prompts([8]))
    ran = []
    run_step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda model, step: (ran.append(step.input_ids.numel()), run_step(model, step))[1]
    )
    inputs = zoo.prompts([30, 5, 1])
    output = compare(models, inputs)
    generated = [row[30:].tolist() for row in output]
    lengths = [row.index(2) + 1 if 2 in row else len(row) for row in generated]
    # The last token of a row is sampled and never run.
    assert sum(ran) == 36 + sum(lengths) - len(lengths)


def test_a_row_that_outgrows_the_pool_raises_after_its_siblings_and_their_tokens_are_kept():
    dense, paged = pair(blocks=10)
    inputs = zoo.prompts([30, 5, 8])
    expected = dense.generate(**inputs, **LENGTHS, min_new_tokens=20)
    with pytest.raises(
        hf_paged.OutOfBlocksError, match=r"needs 11 blocks, \d+ of 10 are free: .*raise memory_budget"
    ) as caught:
        paged.generate(**inputs, **LENGTHS, min_new_tokens=20)
    assert torch.equal(caught.value.sequences[1:], expected[1:])
    assert hf_paged.stats(paged).used_blocks == 0
    compare((dense, paged), zoo.prompts([5, 8]))


def test_a_prompt_that_can_never_fit():
    _, paged = pair(blocks=4)
    with pytest.raises(hf_paged.OutOfBlocksError, match="needs 8 blocks, 4 of 4 are free"):
        paged.generate(**zoo.prompts([30]), **LENGTHS)


def in_threads(*calls):
    """Run the calls at the same time; their results, or what they raised."""
    results: list = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a call hangs"
    return results


def test_calls_of_many_threads_run_in_common_steps(monkeypatch):
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([5 + seed, 3], seed=seed) for seed in range(8)]
    options = {**LENGTHS, "min_new_tokens": 20}
    expected = [dense.generate(**inputs, **options) for inputs in prompts]
    paged.generate(**prompts[0], **options)
    rows = []
    run_step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda model, step: (rows.append(len(step.sample_index)), run_step(model, step))[1]
    )
    results = in_threads(*(lambda inputs=inputs: paged.generate(**inputs, **options) for inputs in prompts))
    for inputs, want, got in zip(prompts, expected, results):
        assert not isinstance(got, Exception), got
        assert_rows_equal(dense, inputs, want, got)
    assert max(rows) > 2, "no two calls ever shared a step"


class Streamer:
    """Collects tokens; does what it is told at the third."""

    def __init__(self, at_third=lambda: None):
        self.tokens, self.ended, self.at_third = [], False, at_third

    def put(self, tokens):
        self.tokens.append(tokens.flatten().tolist())
        if len(self.tokens) == 4:  # The first is the prompt.
            self.at_third()

    def end(self):
        self.ended = True


def test_a_call_that_raises_leaves_the_others_and_the_pool_whole():
    dense, paged = pair(token_budget=64)
    good, bad = zoo.prompts([9, 3]), zoo.prompts([7])
    expected = dense.generate(**good, **LENGTHS)

    def fail():
        raise KeyError("the consumer is gone")

    results = in_threads(
        lambda: paged.generate(**good, **LENGTHS),
        lambda: paged.generate(**bad, **LENGTHS, min_new_tokens=20, streamer=Streamer(fail)),
        lambda: paged.generate(**good, **LENGTHS),
    )
    assert isinstance(results[1], KeyError)
    assert torch.equal(results[0], expected) and torch.equal(results[2], expected)


def test_a_slow_streamer_holds_up_its_own_call_only():
    _, paged = pair(token_budget=64)
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    released, options = threading.Event(), {**LENGTHS, "min_new_tokens": 20}
    slow = Streamer(lambda: released.wait(30))

    def quick():
        try:
            while len(slow.tokens) < 4:
                time.sleep(0.01)
            return paged.generate(**zoo.prompts([9, 3]), **options)
        finally:
            released.set()

    results = in_threads(lambda: paged.generate(**zoo.prompts([7]), streamer=slow, **options), quick)
    assert all(isinstance(result, torch.Tensor) for result in results), results
    assert slow.ended and len(slow.tokens) == 21


def test_a_callback_may_call_the_model_again():
    dense, paged = pair()
    inner = []
    streamer = Streamer(lambda: inner.append(paged.generate(**zoo.prompts([5]), **LENGTHS)))
    inputs = zoo.prompts([9])
    assert torch.equal(paged.generate(**inputs, **LENGTHS, streamer=streamer), dense.generate(**inputs, **LENGTHS))
    assert torch.equal(inner[0], dense.generate(**zoo.prompts([5]), **LENGTHS))


def test_unseeded_calls_at_the_same_time_differ():
    _, paged = pair(token_budget=64)
    inputs = zoo.prompts([9])
    options = {**LENGTHS, "min_new_tokens": 20, "do_sample": True}
    results = in_threads(*[lambda: paged.generate(**inputs, **options)] * 4)
    assert len({tuple(result[0].tolist()) for result in results}) == 4


def test_a_seeded_call_in_company_equals_one_alone():
    dense, paged = pair(token_budget=64)
    inputs, started, options = zoo.prompts([9, 4]), threading.Event(), {**LENGTHS, "min_new_tokens": 20}
    torch.manual_seed(5)
    expected = dense.generate(**inputs, **options, **SAMPLE)

    def company():
        started.wait(30)
        return paged.generate(**zoo.prompts([6, 6, 2]), **options)  # Greedy: it draws nothing.

    def seeded():
        torch.manual_seed(5)
        started.set()
        return paged.generate(**inputs, **options, **SAMPLE)

    assert torch.equal(in_threads(seeded, company)[0], expected)


class Backwards(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return -scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


FALLBACKS = {
    "a processor that may look at other rows: Backwards": {"logits_processor": LogitsProcessorList([Backwards()])},
    "a criterion that may look at other rows": {"stopping_criteria": StoppingCriteriaList([Never()])},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "padding that is not on the left": {"attention_mask": torch.tensor([[1] * 7 + [0] * 2, [1] * 9])},
    "no cache": {"use_cache": False},
    "rows that go on after they are finished": {"max_time": 1e3, "eos_token_id": None},
    "positions of the caller's own": {"position_ids": torch.arange(3, 12)[None].expand(2, -1)},
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_cannot_be_packed_runs_the_original_loop_and_is_counted(reason):
    dense, paged = pair()
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    inputs = {**zoo.prompts([9, 9]), **FALLBACKS[reason]}
    expected, got = (model.generate(**inputs, **LENGTHS) for model in (dense, paged))
    assert torch.equal(getattr(expected, "sequences", expected), getattr(got, "sequences", got))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 1 and list(stats.fallbacks.values()) == [1]
    assert next(iter(stats.fallbacks)).startswith(reason)
    del expected, got


def test_a_model_whose_rope_depends_on_the_forward_is_not_packed():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = zoo.build("llama", "paged", rope_parameters=rope)
    model.generate(**zoo.prompts([9, 3]), **LENGTHS)
    assert list(hf_paged.stats(model).fallbacks) == ["frequencies that depend on the whole forward"]
