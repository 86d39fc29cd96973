"""The microbenchmarks on a tiny model: their figures, their results files, and the counters that they rest on."""

import importlib
import json

import pytest
import torch

import hf_paged
from hf_paged.cli import main
from hf_paged_evals.microbench import attention_kernel, decode_step, pipeline_speed
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.runner import results
from support import tiny_eval, zoo

# What each takes besides --quick.
MODEL, DATASET = "--model", "--dataset"
TAKES = {
    "decode_step": (MODEL,),
    "latent_step": (),
    "short_prompt": (MODEL,),
    "prefix": (MODEL,),
    "saved_prefix": (MODEL,),
    "swap": (MODEL,),
    "threads": (MODEL, DATASET),
    "programs": (),
    "pipeline_speed": (MODEL, DATASET),
    "async_latency": (MODEL, DATASET),
    "scheduler_cost": (),
    "identity_cost": (MODEL,),
    "resident": (),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("microbench")
    (folder / "texts.txt").write_text("\n".join(tiny_eval.TEXT[start:][: 10 + 2 * start] for start in range(16)))
    return {MODEL: tiny_eval.save_model(folder / "model"), DATASET: str(folder / "texts.txt")}


def measured(name, files, folder, *words) -> dict:
    """The figures of a quick run, by their names."""
    out = folder / f"{name}.json"
    given = [word for option in TAKES[name] for word in (option, files[option])]
    assert main.main(["eval", "microbench", name, "--quick", *given, *words, "--out", str(out)]) == 0
    (section,) = results.load(out)["sections"]
    assert section["task"] == name and section["flags"] == [] and section["seconds"] > 0
    return {figure["name"]: figure["value"] for figure in section["figures"]}


@pytest.mark.parametrize("name", TAKES)
def test_every_one_measures_and_writes_results(name, files, tmp_path):
    figures = measured(name, files, tmp_path)
    assert len(figures) > 2 and all(value >= 0 for value in figures.values())


def test_a_decode_step_in_other_kv_formats(files, tmp_path):
    figures = measured("decode_step", files, tmp_path, "--case", "8x128", "--kv-dtype", "int8", "fp8_e4m3")
    assert {"8x128: better dense over paged, int8", "8x128: better dense over paged, fp8_e4m3"} < figures.keys()


def test_two_runs_are_compared(files, tmp_path, capsys):
    for run in ("before", "after"):
        (tmp_path / run).mkdir()
        measured("scheduler_cost", files, tmp_path / run)
    words = [str(tmp_path / run / "scheduler_cost.json") for run in ("before", "after")]
    assert main.main(["eval", "compare", *words]) == 0
    assert "| scheduler_cost | 8 rows: all | ms |" in capsys.readouterr().out


def test_results_say_what_was_run(files, tmp_path):
    measured("short_prompt", files, tmp_path, "--new-tokens", "2")
    found = results.load(tmp_path / "short_prompt.json")
    assert found["command"].startswith("hf-paged eval microbench short_prompt --quick --model")
    assert found["options"]["new_tokens"] == 2 and found["options"]["prompt"] == 8 and "out" not in found["options"]
    json.dumps(found["options"])


def test_rows_of_the_prefix_and_threads_equal_dense_in_float32(files, tmp_path):
    figures = measured("prefix", files, tmp_path, "--dtype", "float32")
    assert (
        figures["rows equal to dense: with prefix cache"] == figures["rows equal to dense: without prefix cache"] == 3
    )
    assert figures["prompt tokens found"] > 50
    figures = measured("saved_prefix", files, tmp_path, "--dtype", "float32")
    assert figures["prompt tokens found"] == 48 and figures["first tokens equal to dense: prefix loaded"] == 1
    figures = measured("threads", files, tmp_path, "--dtype", "float32")
    assert figures["rows equal to dense: paged, all at once"] == 3


def test_programs_are_packed_and_equal_dense(files, tmp_path):
    for words in ([], [MODEL, files[MODEL]]):
        figures = measured("programs", files, tmp_path, *words)
        packed = [value for name, value in figures.items() if name.endswith(", packed calls")]
        equal = [value for name, value in figures.items() if name.endswith(", outputs equal to dense")]
        assert packed == equal == [3, 1, 1, 1]


def test_a_quick_setting_can_be_overridden(files, tmp_path):
    assert "3 rows: all" in measured("scheduler_cost", files, tmp_path, "--rows", "3")


def test_the_list(capsys):
    assert main.main(["eval", "microbench"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in TAKES) and "attention_kernel" in out and "autoload_cost" in out


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main.main(["eval", "microbench", "prefixes"])
    assert "invalid choice: 'prefixes'" in capsys.readouterr().err


def test_turns_run_every_contender_and_drop_the_first_two():
    calls = []
    contenders = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    seconds = take_turns(contenders, 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert calls == [("ab"[number % 2], number) for number in range(10)]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_filled_cache_reads_pages_as_a_generated_one_does(name):
    _, paged = zoo.pair(name)
    hf_paged.release(paged)
    cache = decode_step.filled_cache(paged, batch=2, length=9)
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        paged(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
    stats = hf_paged.stats(paged)
    assert cache.get_seq_length() == 10 and stats.page_reads > 0 and not stats.gathers
    # A forward that ended early leaves nothing behind: the next one is its own.
    paged.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    assert hf_paged.stats(paged).packed_calls == 1


@pytest.mark.parametrize("is_in_order", [True, False], ids=["in order", "random"])
def test_pools_show_the_same_rows_as_pages_and_dense(is_in_order):
    lengths = [130, 5]
    pools = attention_kernel.Pools(lengths, (4, 2, 16), torch.float32, is_in_order)
    tables, context_lens, starts = pools.rows(block_size=16, num_queries=1)
    assert context_lens.tolist() == lengths and starts.tolist() == [0, 1, 2]
    used = [block for row, length in zip(tables.tolist(), lengths) for block in row[: -(-length // 16)]]
    assert len(set(used)) == len(used), "no two rows share a block"
    assert (used == sorted(used)) == is_in_order
    keys, _ = pools.pages(0, 16)
    assert keys.shape == (pools.tokens // 16, 2, 16, 16) and max(used) < len(keys)
    assert pools.dense(0)[0].shape == (2, 2, 130, 16)


def test_the_pipeline_tells_how_far_it_has_read():
    def in_pairs(prompts, **arguments):
        held = []
        for prompt in prompts:
            held.append(prompt)
            if len(held) == 2:
                yield from held
                held = []

    run = pipeline_speed.timed(in_pairs, {}, ["a", "b", "c", "d"])
    assert run.read_at_first == 2 and 0 <= run.first <= run.total and run.longest_wait >= 0


def test_the_interpreters_of_autoload_find_the_entry_point(tmp_path):
    autoload_cost = importlib.import_module("hf_paged_evals.microbench.autoload_cost")
    folder = autoload_cost._installed(tmp_path / "on", True)
    code = "import sys, torch; print(float('hf_paged_autoload' in sys.modules))"
    assert autoload_cost._seconds(code, folder) == 1.0
    assert autoload_cost._seconds(code, autoload_cost._installed(tmp_path / "off", False)) == 0.0
