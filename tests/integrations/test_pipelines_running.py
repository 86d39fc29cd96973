"""Text-generation pipelines while they run: items read ahead, errors, iterators that are dropped, random numbers."""

import subprocess
import sys
import threading

import pytest
import torch
from transformers import TextGenerationPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged
from hf_paged.sampling import rng_replay
from hf_paged_integrations.pipelines import text_generation
from support import texts
from support.packing import pair
from support.pipes import LENGTHS, pipes, rest, settled


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_endless_generator_is_read_a_window_ahead(batch_size, monkeypatch):
    monkeypatch.setattr(text_generation, "WINDOW", 6)
    dense, paged = pipes(batch_size=batch_size)
    prompts, read = texts.prompts(10), 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield prompts[(read - 1) % len(prompts)]

    results = iter(paged(endless()))
    expected = dense(prompts, batch_size=1)
    assert [next(results) for _ in range(25)] == [*expected, *expected, *expected[:5]]
    assert 25 < read <= 25 + 2 * 6 + batch_size
    del results
    assert settled(paged.model)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("kind", [list, iter])
def test_items_follow_as_others_finish(window, kind, rows, monkeypatch):
    monkeypatch.setattr(text_generation, "WINDOW", window)
    dense, paged = pipes(max_length=30, max_new_tokens=None)
    prompts = texts.prompts(30, longest=25)
    inputs = prompts if kind is list else (prompt for prompt in prompts)
    assert list(paged(inputs)) == dense(prompts)
    assert max(rows) == window


def test_a_result_does_not_wait_for_the_next_item_to_arrive():
    """The generator goes on only when the consumer has the result of its last item."""
    dense, paged = pipes()
    prompts, got = texts.prompts(3), threading.Semaphore(0)

    def conversation():
        for prompt in prompts:
            yield prompt
            assert got.acquire(timeout=30), "the result never came"

    results = []
    for result in paged(conversation()):
        results.append(result)
        got.release()
    assert results == dense(prompts)


def test_a_long_item_does_not_hold_up_the_rest(rows):
    _, paged = pipes(max_new_tokens=None, max_length=60)
    read = []
    prompts = ["a", *texts.prompts(9, longest=50)]
    list(paged(read.append(prompt) or prompt for prompt in prompts))
    assert len(read) == 10 and max(rows) > 4


class Failing(TextGenerationPipeline):
    """Cannot postprocess one of the items."""

    def postprocess(self, model_outputs, **parameters):
        if model_outputs["prompt_text"] == "unprintable":
            raise KeyError("unprintable")
        return super().postprocess(model_outputs, **parameters)


BAD = {
    "preprocess": (7, TypeError),
    "forward": ("", ValueError),
    "postprocess": ("unprintable", KeyError),
}


@pytest.mark.parametrize("stage", BAD)
@pytest.mark.parametrize("kind", ["generator", "dataset"])
def test_an_error_comes_in_its_place_and_the_rest_can_be_had(stage, kind):
    item, error = BAD[stage]
    prompts = texts.prompts(12)
    prompts[5] = item
    found = []
    for model in pair(token_budget=64):
        model.generation_config.bos_token_id = None  # What an empty prompt would begin with.
        pipe = Failing(model=model, tokenizer=texts.tokenizer(), **LENGTHS)
        inputs = (prompt for prompt in prompts) if kind == "generator" else KeyDataset([{"p": p} for p in prompts], "p")
        results = iter(pipe(inputs))
        before = [next(results) for _ in range(5)]
        with pytest.raises(error):
            next(results)
        if stage != "postprocess":  # That is the consumer's own; what runs ahead is not stopped for it.
            assert "paged" not in model.config._attn_implementation or not hf_paged.stats(model).used_blocks
        found.append((before, rest(results)))
        model.generation_config.bos_token_id = 1
    assert found[0] == found[1] and len(found[0][1]) == 6


def test_a_list_with_a_bad_item_raises_and_leaves_the_pool_whole():
    _, paged = pipes(max_new_tokens=100, min_new_tokens=100)
    with pytest.raises(TypeError):
        paged([*texts.prompts(9), 7, *texts.prompts(9)])
    assert not hf_paged.stats(paged.model).used_blocks


def test_an_error_of_the_generator_ends_the_results():
    dense, paged = pipes()
    prompts = texts.prompts(4)

    def broken():
        yield from prompts
        raise OSError("the disk is gone")

    for pipe in (dense, paged):
        results, got = iter(pipe(broken())), []
        with pytest.raises(OSError, match="the disk is gone"):
            for result in results:
                got.append(result)
        assert got == dense(prompts) and rest(results) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_an_abandoned_iterator_stops_what_runs_ahead(error):
    _, paged = pipes(max_new_tokens=200, min_new_tokens=200)
    closed = threading.Event()

    def prompts():
        try:
            while True:
                yield "Once upon a time"
        finally:
            closed.set()

    try:
        for _ in paged(prompts()):
            if error is None:
                break
            raise error
    except KeyboardInterrupt:
        pass
    assert settled(paged.model) and closed.wait(5)


ENDINGS = {
    "interrupted": "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start(); next(results)",
    "over": "threading.Thread(target=next, args=(results,), daemon=True).start(); time.sleep(1)",
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_while_items_run_ahead(ending):
    """Their results are lost: 32 items of 10,000 tokens would keep it alive for minutes."""
    program = (
        "import os, signal, sys, threading, time; sys.path.insert(0, 'tests')\n"
        "from support.pipes import pipes\n"
        "pipe = pipes(max_new_tokens=10_000, min_new_tokens=10_000)[1]\n"
        "results = iter(pipe(prompt for prompt in ['a'] * 99))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program + ENDINGS[ending]], capture_output=True, text=True, timeout=90
    )
    is_interrupted = ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert (is_interrupted, ended.returncode == 0) == (ending == "interrupted", ending == "over"), ended.stderr


def test_sampled_items_follow_the_seed_one_after_another(rows, caplog):
    dense, paged = pipes(do_sample=True, temperature=1.3)
    results = []
    for pipe in (dense, paged):
        torch.manual_seed(3)
        results.append((pipe(texts.prompts(6)), torch.rand(1).item()))
    assert results[0] == results[1]
    assert set(rows) == {1}


def test_sampled_items_run_together_if_torch_was_never_seeded(rows, monkeypatch):
    _, paged = pipes(do_sample=True, min_new_tokens=12)
    torch.seed()
    monkeypatch.setattr(rng_replay, "_SEED_AT_IMPORT", torch.initial_seed())
    results = paged(["the same"] * 8)
    assert max(rows) > 4
    assert len({result[0]["generated_text"] for result in results}) > 1


def test_a_fresh_process_is_unseeded_until_torch_is_seeded():
    program = (
        "import hf_paged, torch; from hf_paged.sampling.rng_replay import is_unseeded; before = is_unseeded(); "
        "torch.manual_seed(0); assert before and not is_unseeded()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_seed_from_before_the_import_counts(monkeypatch):
    torch.manual_seed(5)
    monkeypatch.setattr(rng_replay, "_SEED_AT_IMPORT", 5)
    assert not rng_replay.is_unseeded()


def test_the_pipelines_own_default_is_to_sample():
    """transformers samples unless the model says otherwise: seeded, a paged pipeline gives the same."""
    results = []
    for model in pair(token_budget=64):
        torch.manual_seed(1)
        pipe = pipeline("text-generation", model=model, tokenizer=texts.tokenizer(), max_new_tokens=5)
        results.append(pipe(texts.prompts(4)))
    assert pipe._default_generation_config.do_sample and results[0] == results[1]
