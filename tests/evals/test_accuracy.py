"""The accuracy tasks on a tiny model: an equal backend passes, and each kind of wrong one is flagged."""

import json

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_paged_evals.accuracy import humaneval
from hf_paged_evals.accuracy.batches import BatchInvariance
from hf_paged_evals.accuracy.choice import MultipleChoice
from hf_paged_evals.accuracy.greedy import GreedyMatch
from hf_paged_evals.accuracy.humaneval import HumanEval
from hf_paged_evals.accuracy.logits import ForcedLogits
from hf_paged_evals.accuracy.needle import NeedleInHaystack
from hf_paged_evals.accuracy.perplexity import Perplexity
from hf_paged_evals.data import offline
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import DatasetChoice
from hf_paged_evals.runner.task import Sample
from support.tiny_eval import options_for, save_model, save_texts

TASKS = {
    GreedyMatch(): {
        "humaneval": 6,
        "sharegpt": 0,
        "new_tokens": 12,
        "batch": 4,
        "baseline_batch": 2,
        "max_prompt": 200,
    },
    ForcedLogits(): {"humaneval": 6, "sharegpt": 0, "steps": 8, "batch": 3, "max_prompt": 200},
    BatchInvariance(): {
        "humaneval": 6,
        "sharegpt": 0,
        "sizes": [2, 6],
        "probes": 3,
        "new_tokens": 8,
        "max_prompt": 200,
    },
    Perplexity(): {"length": 64, "stride": 32, "windows": 12, "chunk": 16, "batch": 4},
    NeedleInHaystack(): {"lengths": [140, 180], "depths": [0.0, 0.5, 1.0], "new_tokens": 4},
}
LOSSY_NEEDS = ("greedy", "logits", "batch", "perplexity")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return save_model(folder / "model"), save_texts(folder)


def evaluate(task, options, change=None):
    """The section of a task, its records through JSON as the runner has them."""
    models = ModelPair(options)
    if change is not None:
        change(models)
    records = [json.loads(json.dumps(task.run(sample, models))) for sample in task.samples(options)]
    assert records == json.loads(json.dumps(records))
    return task.summarise(records, options)


def figures(section):
    return {figure.name: figure for figure in section.figures}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_pages_are_as_good_as_dense(task, files):
    section = evaluate(task, options_for(task, *files, settings=TASKS[task]))
    assert section.flags == [] and figures(section)["page reads"].value > 0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_dense_against_itself(task, files):
    section = evaluate(task, options_for(task, *files, settings=TASKS[task], backend="sdpa"))
    names = [figure.name for figure in section.figures]
    assert section.flags == [] and len(set(names)) == len(names)


def test_every_row_is_equal_in_float32(files):
    task = next(iter(TASKS))
    equal = figures(evaluate(task, options_for(task, *files, settings=TASKS[task])))["rows equal"]
    assert (equal.value, equal.high) == (100.0, 100.0) and equal.low < 70


def test_preemptions_change_no_token(files):
    task = next(iter(TASKS))
    # A block of 4 tokens takes 2 KiB: two prompts of 33 blocks and more fit into 70, and their new tokens do not.
    options = options_for(task, *files, settings=TASKS[task], memory_budget="140KiB", token_budget=64)
    section = evaluate(task, options)
    counted = {row[0]: row[1] for table in section.tables for row in table.rows if table.title == "Through the pages"}
    assert counted["preemptions"] > 0
    assert figures(section)["rows equal"].value == 100 and section.flags == []


@pytest.mark.parametrize("task", [task for task in TASKS if task.name != "needle"], ids=lambda task: task.name)
def test_a_dense_cache_in_disguise_is_flagged(task, files):
    section = evaluate(
        task,
        options_for(task, *files, settings=TASKS[task]),
        lambda models: models.backend.set_attn_implementation("sdpa"),
    )
    assert section.flags == ["no attention call read pages: what was measured is a dense cache"]


@pytest.mark.parametrize("task", [task for task in TASKS if task.name in LOSSY_NEEDS[:2]], ids=lambda task: task.name)
def test_rounded_keys_and_values_are_flagged(task, files):
    lossy = evaluate(task, options_for(task, *files, settings=TASKS[task], kv_dtype="float8_e5m2"))
    assert any("rounding does not explain" in flag or "times as much as" in flag for flag in lossy.flags)
    lossless = evaluate(task, options_for(task, *files, settings=TASKS[task], kv_dtype="float32"))
    assert lossless.flags == []


def forgetful(module, query, key, value, attention_mask, **kwargs):
    """Attention that loses the first token of the context once it decodes."""
    if query.shape[2] == 1:
        key, value = key[:, :, 1:], value[:, :, 1:]
        attention_mask = None if attention_mask is None else attention_mask[..., 1:]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.fixture
def forgetful_backend():
    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", sdpa_mask)
    yield "forgetful"
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("forgetful")


@pytest.mark.parametrize("task", [task for task in TASKS if task.name in LOSSY_NEEDS[:2]], ids=lambda task: task.name)
def test_a_backend_that_drops_a_token_is_flagged(task, files, forgetful_backend):
    section = evaluate(task, options_for(task, *files, settings=TASKS[task], backend=forgetful_backend))
    assert any("rounding does not explain" in flag or "times as much as" in flag for flag in section.flags)


def test_logits_of_a_wrong_scale_show_in_the_perplexity(files):
    def disturb(models):
        models.backend.get_output_embeddings().register_forward_hook(lambda module, args, output: 2 * output)

    task = Perplexity()
    section = evaluate(task, options_for(task, *files, settings=TASKS_BY_NAME["perplexity"]), disturb)
    assert any("nats/token off the baseline" in flag for flag in section.flags)
    change = figures(section)["paired difference"]
    assert change.low > 0 or change.high < 0


TASKS_BY_NAME = {task.name: settings for task, settings in TASKS.items()}


def test_logits_that_are_not_numbers_are_flagged(files):
    def spoil(models):
        models.backend.get_output_embeddings().register_forward_hook(lambda module, args, output: output * float("nan"))

    for task in (ForcedLogits(), Perplexity()):
        section = evaluate(task, options_for(task, *files, settings=TASKS_BY_NAME[task.name]), spoil)
        assert "not finite" in section.flags[0]


def test_batches_that_change_tokens_are_flagged(files):
    def depend(models):
        def add(module, args, output):
            return output + 3 * torch.randn(output.shape, generator=noise)

        noise = torch.Generator().manual_seed(0)
        models.backend.get_output_embeddings().register_forward_hook(add)

    task = BatchInvariance()
    section = evaluate(task, options_for(task, *files, settings=TASKS_BY_NAME["batch"]), depend)
    assert any("without a near-tie" in flag for flag in section.flags)


def test_multiple_choice_of_the_users_questions(files, tmp_path):
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [str(2 * n), "a ship", f"{n} {n}"], "answer": n % 3}
        for n in range(6)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = MultipleChoice()
    section = evaluate(task, options_for(task, *files, dataset=DatasetChoice(str(path))))
    assert section.flags == [] and figures(section)["same choice"].value == 100
    assert figures(section)["largest difference of a log-likelihood"].value < 1e-3
    with pytest.raises(ValueError, match="has no column question, choices, answer, only text"):
        task.samples(options_for(task, *files))


PROBLEM = {
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


@pytest.fixture
def problems(monkeypatch):
    found = [{**PROBLEM, "task_id": f"Tiny/{n}", "canonical_solution": f"    return {n} * x\n"} for n in range(10)]
    monkeypatch.setattr(offline, "humaneval_problems", lambda: found)
    return found


def test_pass_at_1_is_paired(files, problems, monkeypatch):
    right, wrong = [list(map(ord, text)) for text in ("\n    return 2 * x", "\n    return x")]
    spoken = iter([[right] * 10, [wrong] * 7 + [right] * 3])
    monkeypatch.setattr(humaneval, "generate", lambda *args, **options: next(spoken))
    monkeypatch.setattr(humaneval, "completions", lambda tokenizer, prompts, rows: ["".join(map(chr, r)) for r in rows])
    task = HumanEval()
    section = evaluate(task, options_for(task, *files, dataset=None, settings={"problems": 10}))
    found = figures(section)
    assert (found["pass@1, sdpa"].value, found["pass@1, paged"].value) == (100.0, 30.0)
    assert found["pass@1, paired difference"].high < 0 and found["McNemar p"].value == pytest.approx(2 / 2**7)
    assert found["programs equal"].value == 30.0
    assert section.flags[0].startswith("pass@1 differs by -70.0 points") and "no attention call" in section.flags[1]


def test_humaneval_and_choice_of_its_solutions(files, problems):
    for task, settings in ((HumanEval(), {"new_tokens": 8}), (MultipleChoice(), {"questions": 4})):
        section = evaluate(task, options_for(task, *files, dataset=None, settings=settings))
        assert section.flags == [] and figures(section)["page reads"].value > 0


def test_the_records_of_a_sample_depend_on_nothing_else(files):
    task = next(iter(TASKS))
    options = options_for(task, *files, settings=TASKS[task])
    first, second = task.samples(options)
    models = ModelPair(options)
    in_order = [task.run(first, models), task.run(second, models)]
    models = ModelPair(options)
    reverse = [task.run(second, models), task.run(first, models)]
    assert in_order[0]["rows"] == reverse[1]["rows"] and in_order[1]["rows"] == reverse[0]["rows"]
    assert isinstance(first, Sample) and first.id != second.id
