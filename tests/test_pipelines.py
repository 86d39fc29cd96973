"""Text-generation pipelines: the same results as on a dense model, in order, while later items still decode."""

import threading
import time

import pytest
import texts
import torch
import zoo
from packing import pair
from transformers import GenerationConfig, TextGenerationPipeline, TextStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged
from hf_paged import engine
from hf_paged.integrations import pipelines

LENGTHS = {"max_new_tokens": 12, "do_sample": False}
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "So"}] if number % 2 else
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    for number, text in enumerate(texts.prompts(6, seed=1))
]  # fmt: skip


def pipes(models=None, **options):
    """The same pipeline over the dense model and the paged one."""
    models = pair(token_budget=64) if models is None else models
    return [
        pipeline("text-generation", model=model, tokenizer=texts.tokenizer(), **{**LENGTHS, **options})
        for model in models
    ]


@pytest.fixture
def rows(monkeypatch):
    """Rows of each step that the engine ran."""
    seen = []
    run_step = engine.run_step
    monkeypatch.setattr(
        engine, "run_step", lambda model, step: (seen.append(len(step.sample_index)), run_step(model, step))[1]
    )
    return seen


def rest(results) -> list:
    """What is left of an iterator of a pipeline: ``iter`` would begin it anew."""
    return list(iter(results.__next__, None))


def settled(model) -> bool:
    """Whether all blocks come back, and all threads end, without anybody asking for a result."""
    for _ in range(500):
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("hf_paged")]
        if not threads and not hf_paged.stats(model).used_blocks:
            return True
        time.sleep(0.01)
    return False


CALLS = {
    "defaults": {},
    "new_text": {"return_full_text": False},
    "tensors": {"return_tensors": True},
    "batches": {"batch_size": 4},
    "large_batches": {"batch_size": 64},
    "workers": {"num_workers": 1},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "stop_sequence": {"stop_sequence": ["e", "ab"]},
    "config": {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)},
    "long_prompts": {
        "handle_long_generation": "hole",
        "tokenizer_encode_kwargs": {"truncation": True, "max_length": 9},
    },
    "prefix": {"prefix": "Once "},
}


@pytest.mark.parametrize("case", CALLS)
def test_lists(case, rows):
    dense, paged = pipes(**CALLS[case])
    prompts = texts.prompts(20)
    assert paged(prompts) == dense(prompts)
    assert max(rows) > 8, "the items did not run together"
    assert not hf_paged.stats(paged.model).fallbacks


@pytest.mark.parametrize("case", CALLS)
def test_parameters_of_the_call(case, rows):
    dense, paged = pipes()
    prompts = texts.prompts(9)
    assert paged(prompts, **CALLS[case]) == dense(prompts, **CALLS[case])
    assert max(rows) > 4


@pytest.mark.parametrize("kind", ["list", "generator", "lone"])
@pytest.mark.parametrize("continued", [None, False])
def test_chats(kind, continued):
    dense, paged = pipes(continue_final_message=continued)
    make = {"list": lambda: CHATS, "generator": lambda: (chat for chat in CHATS), "lone": lambda: CHATS[0]}[kind]
    assert list(paged(make())) == list(dense(make()))


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_workers": 1}], ids=["one", "batches", "workers"])
def test_generators_and_dataset_columns(options, rows):
    dense, paged = pipes(**options)
    prompts = texts.prompts(11)
    expected = dense(prompts)
    assert list(paged(prompt for prompt in prompts)) == expected
    column = KeyDataset([{"prompt": prompt} for prompt in prompts], "prompt")
    results = paged(column)
    assert len(results) == -(-len(prompts) // options.get("batch_size", 1)), "a length that tqdm shows"
    assert list(results) == expected
    again = dense(column)
    assert len(list(again)) == len(prompts) and list(results) == list(again), "a dataset can be gone through again"
    assert max(rows) > 2


def test_a_column_of_datasets():
    datasets = pytest.importorskip("datasets")
    dense, paged = pipes()
    column = KeyDataset(datasets.Dataset.from_dict({"prompt": texts.prompts(7)}), "prompt")
    assert list(paged(column)) == list(dense(column))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_endless_generator_is_read_a_window_ahead(batch_size, monkeypatch):
    monkeypatch.setattr(pipelines, "WINDOW", 6)
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


def test_a_result_does_not_wait_for_the_next_item_to_arrive():
    """The generator goes on only when somebody has got the result of its last item."""
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


def test_sampled_items_follow_the_seed_one_after_another(rows, caplog):
    dense, paged = pipes(do_sample=True, temperature=1.3)
    results = []
    for pipe in (dense, paged):
        torch.manual_seed(3)
        results.append((pipe(texts.prompts(6)), torch.rand(1).item()))
    assert results[0] == results[1]
    assert set(rows) == {1}


def test_sampled_items_run_together_if_nobody_seeded_torch(rows, monkeypatch):
    _, paged = pipes(do_sample=True, min_new_tokens=12)
    torch.seed()
    monkeypatch.setattr(pipelines, "_SEED_AT_IMPORT", torch.initial_seed())
    results = paged(["the same"] * 8)
    assert max(rows) > 4
    assert len({result[0]["generated_text"] for result in results}) > 1


def test_the_pipelines_own_default_is_to_sample():
    """transformers samples unless the model says otherwise: seeded, a paged pipeline gives the same."""
    results = []
    for model in pair(token_budget=64):
        torch.manual_seed(1)
        pipe = pipeline("text-generation", model=model, tokenizer=texts.tokenizer(), max_new_tokens=5)
        results.append(pipe(texts.prompts(4)))
    assert pipe._default_generation_config.do_sample and results[0] == results[1]


class Collected(TextStreamer):
    def __init__(self):
        super().__init__(texts.tokenizer())
        self.texts = []

    def on_finalized_text(self, text, stream_end=False):
        self.texts.append((text, stream_end))


ONE_BY_ONE = {
    "beams": lambda: {"num_beams": 3},
    "streamer": lambda: {"streamer": Collected()},
    "several": lambda: {"do_sample": True, "num_return_sequences": 2},
    "time": lambda: {"max_time": 60.0},
    "scores": lambda: {"return_dict_in_generate": True, "output_scores": True},
    "no_cache": lambda: {"use_cache": False},
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_what_cannot_run_together_runs_as_it_did(case, rows):
    prompts, results, streamed = texts.prompts(4, longest=12), [], []
    for pipe in pipes():
        torch.manual_seed(0)
        options = ONE_BY_ONE[case]()
        found = pipe(prompts, **options)
        results.append([[record["generated_text"] for record in records] for records in found])
        streamed.append(options.get("streamer", Collected()).texts)
    assert results[0] == results[1] and streamed[0] == streamed[1]
    assert all(count <= 2 for count in rows)
    assert bool(streamed[0]) == (case == "streamer")


def test_disable_gives_the_pipelines_back():
    _, paged = pipes()
    wrapped = TextGenerationPipeline.get_iterator
    hf_paged.disable()
    assert TextGenerationPipeline.get_iterator is wrapped.__wrapped__
    hf_paged.enable()
    hf_paged.enable()
    assert TextGenerationPipeline.get_iterator.__wrapped__ is wrapped.__wrapped__


def test_dense_models_are_not_touched(monkeypatch):
    dense = pipeline("text-generation", model=zoo.pair("llama")[0], tokenizer=texts.tokenizer(), **LENGTHS)
    monkeypatch.setattr(pipelines, "RunAhead", None)
    assert len(dense(texts.prompts(3))) == 3
