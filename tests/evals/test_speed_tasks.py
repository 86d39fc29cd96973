"""The speed tasks on a tiny model: whole, resumable, and honest about what was timed."""

import dataclasses
import json
import mmap

import pytest
import torch

import hf_paged
from hf_paged_evals import tasks
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.report.write import write
from hf_paged_evals.runner import results
from hf_paged_evals.runner.run import run_tasks
from hf_paged_evals.speed import memory_probe
from hf_paged_evals.speed.contenders import Lengths, contender, label
from hf_paged_evals.speed.context import Context
from hf_paged_evals.speed.latency import Latency
from hf_paged_evals.speed.memory import Memory
from hf_paged_evals.speed.paper import Paper
from hf_paged_evals.speed.pressure import Pressure
from hf_paged_evals.speed.tasks import TASKS
from hf_paged_evals.speed.throughput import Throughput
from hf_paged_evals.speed.timing import prefix_hits
from support import tiny_eval

SMALL = {
    "throughput": {
        "prompts": 5,
        "new_tokens": 5,
        "max_prompt": 60,
        "uniform_prompt": 12,
        "batches": [1, 3],
        "repeats": 1,
        "extras": True,
    },
    "latency": {"requests": 4, "new_tokens": 4, "max_prompt": 60, "rates": [40.0, 80.0], "batches": [1, 2]},
    "memory": {"rows": 3, "max_prompt": 60, "new_tokens": 3, "long_rows": 0, "generate_batch": False},
    "pressure": {"prompts": 6, "max_prompt": 60, "new_tokens": 16, "shares": [1.0, 0.4]},
    "paper": {
        "max_prompt": 60,
        "waste_prompts": 5,
        "waste_new_tokens": 6,
        "prompts": 2,
        "rows": [2, 3],
        "new_tokens": 8,
        "short_prompt": 40,
        "short_new_tokens": 5,
        "long_prompt": 60,
        "long_new_tokens": 6,
        "long_beams": 2,
        "long_samples": 3,
        "prefix_prompts": 3,
        "own_tokens": 6,
        "prefix_new_tokens": 3,
        "repeats": 1,
    },
    "context": {"lengths": [40, 400], "new_tokens": 3, "repeats": 1},
}
LENGTHS = [12, 50, 31, 8, 44, 23, 17]
QUICK_TO_TEST = [task for task in TASKS if task.name != "memory"]  # It starts processes.


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A tiny model's folder and a file of short texts."""
    folder = tmp_path_factory.mktemp("user")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(tiny_eval.TEXT[4 * place :][:length] for place, length in enumerate(LENGTHS)))
    return tiny_eval.save_model(folder / "model"), str(texts)


@pytest.fixture
def options_of(user, tmp_path):
    """A function from a task to the options of a small run of it."""

    def options(task, **settings):
        return tiny_eval.options_for(task, *user, out=tmp_path / "out", settings=SMALL[task.name] | settings)

    return options


def records_of(task, options, models=None):
    """Every sample's record, as a file would give it back."""
    models = models or ModelPair(options)
    return [json.loads(json.dumps(task.run(sample, models))) for sample in task.samples(options)]


def test_the_command_knows_them():
    assert set(SMALL) == {task.name for task in TASKS} <= set(tasks.TASKS)
    assert all(task.is_timed for task in TASKS)


@pytest.mark.parametrize("task", QUICK_TO_TEST, ids=lambda task: task.name)
def test_a_run_gives_a_report_and_a_second_one_runs_nothing(task, options_of, tmp_path, monkeypatch):
    options = options_of(task)
    sections = run_tasks(options, [task])
    found = results.collect(options.identity(), sections, ["hf-paged", "eval"])
    write(found, tmp_path)
    assert sections[0].figures and sections[0].tables and sections[0].seconds > 0
    monkeypatch.setattr(type(task), "run", None)
    assert run_tasks(options, [task]) == sections


def test_an_interrupted_run_goes_on_where_it_was(options_of, monkeypatch):
    """Timed samples stay; the rest follows, in the same order."""
    task, ran = Context(), []
    options, run = options_of(task, repeats=2), Context.run

    def stops_at_the_third(self, sample, models):
        if len(ran) == 3:
            ran.append("stop")
            raise KeyboardInterrupt
        ran.append(sample.id)
        return run(self, sample, models)

    monkeypatch.setattr(Context, "run", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(options, [task])
    run_tasks(options, [task])
    ran.remove("stop")
    assert ran == [sample.id for sample in task.samples(options)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_equal_options_give_equal_samples(task, options_of):
    options = options_of(task)
    first, second = task.samples(options), task.samples(options)
    assert first == second and len({sample.id for sample in first}) == len(first)
    other = task.samples(dataclasses.replace(options, seed=1))
    assert [sample.id for sample in other] == [sample.id for sample in first]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_quick_settings_are_settings(task):
    assert task.quick.keys() <= task.settings.keys()


def test_every_turn_runs_every_contender_once(options_of):
    samples = Throughput().samples(options_of(Throughput(), repeats=2))
    turns = {0: [], 1: []}
    for sample in samples:
        given = sample.payload
        turns[given["turn"]].append((given["workload"], label(given["contender"], given["batch"])))
    assert turns[0] == turns[1] and len(set(turns[0])) == len(turns[0])
    assert [sample.payload["turn"] for sample in samples] == sorted(sample.payload["turn"] for sample in samples)
    batches = {name for workload, name in turns[0] if workload == "ragged"}
    assert {"dense, batch 1", "dense, batch 3", "paged, batch 3", "generate_batch", "llama.cpp", "vLLM"} <= batches
    assert "paged, prepacked, batch 3" in batches and "paged, prepacked, batch 1" not in batches


@pytest.mark.slow
def test_contenders_give_the_same_answers_in_float32(options_of):
    task = Throughput()
    options = options_of(task)
    every = records_of(task, options)
    records = [record for record in every if "seconds" in record]
    for workload in ("ragged", "uniform"):
        some = [record for record in records if record["workload"] == workload]
        assert len({record["contender"] for record in some}) == 4
        assert all(record["answers"] == some[0]["answers"] for record in some)
        assert len(set(some[0]["answers"])) > 1
    pools = [record["pool"] for record in records if "pool" in record]
    assert len(pools) == len([record for record in records if record["contender"].startswith("paged")])
    assert all(pool["page_reads"] > 0 and pool["packed_calls"] > 0 for pool in pools)
    notes = [note for note in task.summarise(every, options).notes if "did not run" in note]
    assert len(notes) == 3 and notes[0].startswith("llama.cpp did not run: no GGUF file of"), "extras say why not"


def test_warm_prompts_have_nothing_in_common_with_those_that_are_timed(options_of):
    options = options_of(Throughput())
    prompts = workloads.uniform(options, 6, 20)
    warm = workloads.warming(prompts, options)
    assert len({tuple(row[:4]) for row in prompts + warm}) == len(prompts) + len(warm)
    assert sorted(map(len, warm)) == [20, 20]
    shared = workloads.shared_prefix(options, 3, prefix=8, own=5)
    assert len({tuple(row[:8]) for row in shared}) == 1 and len({tuple(row[8:]) for row in shared}) == 3
    assert {len(row) for row in shared} == {13}


def test_the_pool_is_empty_before_a_timed_run(options_of, monkeypatch):
    """A prefix that the warm-up or another run left would flatter the one that is timed."""
    task = Throughput()
    options = options_of(task, extras=False)
    models, seen = ModelPair(options), []
    paged = contender(models, "paged", 3)
    generate = type(paged).generate

    def watched(self, prompts, lengths):
        seen.append(hf_paged.stats(models.backend).total_blocks)
        return generate(self, prompts, lengths)

    monkeypatch.setattr(type(paged), "generate", watched)
    sample = next(sample for sample in task.samples(options) if sample.id == "ragged, paged, batch 3, turn 0")
    task.run(sample, models)
    task.run(sample, models)
    assert len(seen) == 4 and seen[0] == seen[2] == 0 < min(seen[1], seen[3]), "warm-up, run, warm-up, run"


def test_every_request_gets_its_tokens_and_its_times(options_of):
    task = Latency()
    records = records_of(task, options_of(task))
    assert len(records) == 6
    for record in records:
        for request in record["requests"]:
            times = request["tokens"]
            assert len(times) == 4 and times == sorted(times) and times[0] > request["arrival"]
    by_rate = {}
    for record in records:
        by_rate.setdefault(record["rate"], set()).add(tuple(request["arrival"] for request in record["requests"]))
    assert all(len(arrivals) == 1 for arrivals in by_rate.values()), "every server gets the same requests"


def test_a_batch_waits_for_nobody_and_takes_no_more_than_its_rows(options_of):
    """Dense, batch 2: rows of one batch have the same times; a later batch begins after the one before."""
    task = Latency()
    options = options_of(task, rates=[1000.0], batches=[2])
    (record,) = [record for record in records_of(task, options) if record["server"] == "dense"]
    times = [tuple(request["tokens"]) for request in record["requests"]]
    batches = list(dict.fromkeys(times))
    assert all(times.count(batch) <= 2 for batch in batches)
    assert all(before[-1] < after[0] for before, after in zip(batches, batches[1:]))


def test_a_small_pool_preempts_and_changes_no_answer(options_of):
    task = Pressure()
    options = options_of(task)
    models = ModelPair(options)
    full, tight = records_of(task, options, models)
    assert tight["pool"]["total_blocks"] < full["pool"]["total_blocks"] and tight["pool"]["preemptions"] > 0
    assert full["pool"]["preemptions"] == 0 and full["answers"] == tight["answers"]
    assert max(share for _, share in tight["course"]) <= 100
    models.backend.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    assert hf_paged.stats(models.backend).total_blocks > full["pool"]["total_blocks"], "the run's own pool is back"


def test_a_backend_without_a_pool_cannot_be_put_under_pressure(options_of):
    options = dataclasses.replace(options_of(Pressure()), backend="eager")
    with pytest.raises(ValueError, match="'eager' has none"):
        Pressure().samples(options)


def test_sharing_saves_blocks_and_prefixes_are_timed(options_of):
    task = Paper()
    records = records_of(task, options_of(task))
    saving = {(r["mode"], r["rows"], r["workload"]): r["saving"] for r in records if r["kind"] == "sharing"}
    assert len(saving) == 10 and all(0 < value < 1 for value in saving.values())
    assert saving["samples", 3, "all"] > saving["samples", 2, "all"]
    timed = [record for record in records if record["kind"] == "prefix speed"]
    ways = [("dense", False), ("paged", False), ("paged", True)]
    assert [(r["shots"], r["contender"], r["stored"]) for r in timed] == [
        (shots, *way) for shots in ("1-shot", "5-shot") for way in ways
    ]
    found = [prefix_hits(record) for record in timed]
    assert found[0] is found[3] is None and found[2] > 0.85 and found[5] > 0.95, "what was stored before is found"
    assert timed[0]["answers"] == timed[1]["answers"] == timed[2]["answers"]
    (waste,) = [record for record in records if record["kind"] == "waste"]
    assert 0.5 < waste["dense"] < 1 and 0.8 < waste["paged"] < 1 and 0.5 < waste["paged_worst"] <= waste["paged"]
    long = {r["mode"]: (r["rows"], r["used_at_end"], r["alone_at_end"]) for r in records if r.get("workload") == "long"}
    blocks_of_a_row = -(-(60 + 6 - 1) // 4)  # The last token is never stored.
    assert {mode: (rows, alone) for mode, (rows, _, alone) in long.items()} == {
        "beams": (2, 2 * blocks_of_a_row),
        "samples": (3, 3 * blocks_of_a_row),
    }
    assert all(60 // 4 <= used < alone / rows + 4 * rows for rows, used, alone in long.values())


def test_kinds_of_the_paper_can_be_left_out(options_of):
    task = Paper()
    options = options_of(task, kinds=["waste"])
    records = records_of(task, options)
    assert [record["kind"] for record in records] == ["waste"]
    names = [figure.name for figure in task.summarise(records, options).figures]
    assert "padding in the rectangle of the prompts" in names and not any("saved" in name for name in names)
    with pytest.raises(ValueError, match="paper.kinds names some of waste, sharing, long, prefix; got speed"):
        task.samples(options_of(task, kinds=["speed"]))


def test_one_workload_of_the_throughput_can_be_chosen(options_of):
    task = Throughput()
    samples = task.samples(options_of(task, workloads=["uniform"]))
    assert {sample.payload["workload"] for sample in samples} == {"uniform"}
    with pytest.raises(ValueError, match="throughput.workloads names some of ragged, uniform; got"):
        task.samples(options_of(task, workloads=["odd"]))


def test_prepacked_weights_are_a_copy_for_their_own_contender(options_of):
    options = options_of(Throughput())
    models = ModelPair(options)
    prompts = workloads.uniform(options, 2, 12)
    rows = [contender(models, name).generate(prompts, Lengths(4)) for name in ("paged", "paged, prepacked")]
    assert rows[0] == rows[1]
    assert hf_paged.stats(models.prepacked).packed_calls == 1 == hf_paged.stats(models.backend).packed_calls
    models.release()
    assert hf_paged.stats(models.prepacked).total_blocks == 0 == hf_paged.stats(models.backend).total_blocks


def test_a_tiny_model_stands_in_for_what_is_too_long(options_of):
    task = Context()
    options = options_of(task)
    records = records_of(task, options)
    assert [record["model"] for record in records] == ["model", "model", *["a tiny random llama"] * 2]
    assert records[0]["answer"] == records[1]["answer"] and records[2]["answer"] == records[3]["answer"]
    assert all(record["first"] > 0 and record["each"] > 0 for record in records)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(options_of):
    task = Memory()
    options = options_of(task)
    (sample, _) = task.samples(options)
    assert sample.id == "ragged, dense, turn 0"
    record = task.run(sample, ModelPair(options))
    assert record["contender"] == "dense" and record["rows"] == 3 and record["peak"] >= 0 and record["course"]


@pytest.mark.slow
def test_a_process_that_fails_says_why(options_of):
    task = Memory()
    options = options_of(task)
    sample = task.samples(options)[0]
    lost = dataclasses.replace(options, model="/nowhere/at/all")
    with pytest.raises(RuntimeError, match="ended with 1: .*nowhere"):
        task.run(sample, ModelPair(lost))


def test_memory_that_is_taken_is_seen():
    def take():
        # Mapped: the allocator may have memory left that is resident already.
        with mmap.mmap(-1, 64 * 2**20) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1

    assert 60 < memory_probe.measure(take)["peak"] < 80


@pytest.mark.parametrize("stops", [True, False])
def test_answers_end_where_they_are_told_to(options_of, stops):
    options = options_of(Throughput())
    models = ModelPair(options)
    prompts = workloads.ragged(options, 4, 60)
    # The token that the first row says second becomes the end.
    free = contender(models, "dense").generate(prompts, Lengths(6, stops=False))
    models.tokenizer.eos_token_id = free[0][1]
    try:
        rows = [contender(models, name).generate(prompts, Lengths(6, stops)) for name in ("dense", "paged")]
    finally:
        models.tokenizer.eos_token = "</s>"
    assert rows[0] == rows[1] and all(len(row) == 6 for row in free)
    assert rows[0] == free if not stops else rows[0][0] == free[0][: free[0].index(free[0][1]) + 1]
