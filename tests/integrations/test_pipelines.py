"""Text-generation pipelines: with any inputs and parameters, results are those of a dense model."""

import operator

import datasets
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextGenerationPipeline,
    TextStreamer,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged
from hf_paged import reasons
from hf_paged.compat import transformers as upstream
from hf_paged.compat.symbols import words_of
from hf_paged_integrations.pipelines import text_generation
from support import texts, zoo
from support.pipes import LENGTHS, pipes

CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "So"}] if number % 2 else
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    for number, text in enumerate(texts.prompts(6, seed=1))
]  # fmt: skip


# Older pipelines take one stop sequence, and look for its tokens.
TAKES_STOP_STRINGS = "stop_strings" in words_of(TextGenerationPipeline._sanitize_parameters.__code__)
CALLS = {
    "defaults": {},
    "new_text": {"return_full_text": False},
    "tensors": {"return_tensors": True},
    "batches": {"batch_size": 4},
    "large_batches": {"batch_size": 64},
    # Rows that last: the items of a worker arrive one by one, more slowly the busier the machine is.
    "workers": {"num_workers": 1, "max_new_tokens": 48},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "stop_sequence": {"stop_sequence": ["e", "ab"] if TAKES_STOP_STRINGS else "e"},
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
    stats = hf_paged.stats(paged.model)
    assert not stats.fallbacks and stats.pipelines_together == 1 and not stats.pipelines_in_turn


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
    dense, paged = pipes()
    column = KeyDataset(datasets.Dataset.from_dict({"prompt": texts.prompts(7)}), "prompt")
    assert list(paged(column)) == list(dense(column))


def test_scores():
    """They are numbers that differ in the last bits; the texts do not."""
    options = {"return_dict_in_generate": True, "output_scores": True}
    found = [[records[0] for records in pipe(texts.prompts(4), **options)] for pipe in pipes()]
    assert [record["generated_text"] for record in found[0]] == [record["generated_text"] for record in found[1]]
    for dense, paged in zip(*found):
        assert torch.allclose(*(torch.tensor(record["scores"]) for record in (dense, paged)), atol=1e-4)


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
    "attentions": lambda: {"return_dict_in_generate": True, "output_attentions": True},
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
    stats = hf_paged.stats(pipe.model)
    assert stats.pipelines_together == 0 and list(stats.pipelines_in_turn.values()) == [1]


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """Warnings of reasons, as in a new process."""
    messages: list[str] = []
    monkeypatch.setattr(reasons, "_told", set())
    monkeypatch.setattr(reasons.logger, "warning", messages.append)
    return messages


CHANGES = {
    "a name is gone": (upstream, "_prepare", operator.attrgetter("_gone"), "AttributeError"),
    "another signature": (text_generation, "generate_options", lambda: None, "TypeError"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_private_code_is_no_wrong_argument_and_warns_once(change, warned, monkeypatch):
    """The results are those of transformers; that the items run one after another must not go unseen."""
    dense, paged = pipes()
    prompts = texts.prompts(3)
    owner, name, replacement, error = CHANGES[change]
    monkeypatch.setattr(owner, name, replacement)
    for _ in range(2):
        assert paged(prompts) == dense(prompts)
    reason = f"transformers prepares their arguments in another way than hf_paged expects ({error})"
    assert hf_paged.stats(paged.model).pipelines_in_turn == {reason: 2}
    (message,) = warned
    assert f"a pipeline's items run one after another, because {reason}. Remedy: install" in message


@pytest.mark.parametrize("config", ["no config", 3.0], ids=str)
def test_wrong_arguments_are_the_callers_and_do_not_warn(config, warned):
    errors = []
    for pipe in (paged := pipes())[::-1]:
        with pytest.raises(Exception) as caught:  # noqa: B017  Whatever transformers raises.
            pipe(texts.prompts(3), generation_config=config)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1] and not warned
    assert list(hf_paged.stats(paged[1].model).pipelines_in_turn) == [f"their arguments raise {errors[0][0].__name__}"]


class Counting(LogitsProcessor):
    """Favours another token at each call, whichever item it is for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_add(1, torch.tensor([5 + self.calls * 7 % 80]), torch.full((len(scores), 1), 2.0))


class StopAfter(StoppingCriteria):
    """Ends an item by the number of its calls, over all items."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return self.calls % 7 == 0


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sample"])
def test_items_that_share_a_processor_and_a_criterion_are_packed_in_turn(options, rows):
    prompts, results = texts.prompts(6, longest=12), []
    both = pipes()
    for pipe in both:
        torch.manual_seed(0)
        hooks = {"logits_processor": LogitsProcessorList([Counting()]), "stopping_criteria": [StopAfter()]}
        found = pipe(prompts, **options, **hooks)
        results.append([records[0]["generated_text"] for records in found])
    assert results[0] == results[1] and set(rows) == {1}
    stats = hf_paged.stats(both[1].model)
    assert stats.packed_calls == 6 and not stats.fallbacks and stats.page_reads


def test_guided_items_are_packed_in_turn(rows):
    prompts, both = texts.prompts(4, longest=12), pipes()
    results = [[records[0]["generated_text"] for records in pipe(prompts, guidance_scale=1.6)] for pipe in both]
    assert results[0] == results[1] and set(rows) == {1}
    assert hf_paged.stats(both[1].model).packed_calls == 4 and not hf_paged.stats(both[1].model).fallbacks


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
    monkeypatch.setattr(text_generation, "Prefetch", None)
    assert len(dense(texts.prompts(3))) == 3
