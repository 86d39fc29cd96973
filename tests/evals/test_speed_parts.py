"""The parts of the speed tasks whose results can be told beforehand."""

import sys
import time
import types

import pytest
import torch

from hf_paged_evals.speed.arrivals import Clock, poisson
from hf_paged_evals.speed.contenders import Lengths
from hf_paged_evals.speed.contenders.openvino import FOLDER, OpenVINO
from hf_paged_evals.speed.contenders.vllm import VLLM
from hf_paged_evals.speed.latency import measures
from hf_paged_evals.speed.observe import Steps
from hf_paged_evals.speed.paper_figures import dense_share, rows_beside_paper
from hf_paged_evals.speed.timing import Spread, prefix_hits, rate, ratio
from hf_paged_evals.speed.watch import Watch, thinned


def test_arrivals_depend_on_the_seed_alone():
    assert poisson(2.0, 50, seed=3) == poisson(2.0, 50, seed=3)
    assert poisson(2.0, 50, seed=3) != poisson(2.0, 50, seed=4)


def test_arrivals_come_at_the_rate():
    times = poisson(4.0, 4000, seed=0)
    assert times == sorted(times) and times[0] > 0
    gaps = [after - before for before, after in zip(times, times[1:])]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.05) and deviation == pytest.approx(0.25, rel=0.1), "as if exponential"


def test_latencies_are_what_they_are_called():
    requests = [
        {"arrival": 1.0, "tokens": [1.5, 1.6, 1.9]},
        {"arrival": 2.0, "tokens": [2.1, 2.2, 2.3]},
        {"arrival": 3.0, "tokens": [5.0, 5.1, 5.2]},
    ]
    found = measures(requests)
    assert found["TTFT", 50] == pytest.approx(500) and found["TTFT", 99] == pytest.approx(1970)
    assert found["TPOT", 50] == pytest.approx(100) and found["TPOT", 99] == pytest.approx(198)
    assert found["ITL", 50] == pytest.approx(100) and found["ITL", 99] == pytest.approx(290)
    assert found["served"] == pytest.approx(3 / 5.2)


def test_the_clock_counts_tokens_and_not_the_prompt():
    clock = Clock()
    for value in (torch.tensor([[1, 2, 3]]), torch.tensor([4]), torch.tensor([5])):
        clock.put(value)
    clock.end()
    assert len(clock.times) == 2 and clock.times == sorted(clock.times)


def runs(*seconds):
    return [{"turn": turn, "seconds": each, "new_tokens": 12, "requests": 3} for turn, each in enumerate(seconds)]


def test_ratios_are_taken_within_a_turn():
    """The machine is three times slower in the second turn, for both."""
    assert ratio(runs(2.0, 6.0), runs(1.0, 3.0)) == Spread(2.0, None, None)
    assert rate(runs(2.0, 6.0, 3.0)) == 4.0 and rate(runs(2.0, 6.0, 3.0), "requests") == 1.0


def test_turns_that_only_one_has_run_do_not_count():
    assert ratio(runs(2.0, 1.0), runs(1.0)).value == 2.0


def test_intervals_need_six_turns():
    slow = runs(*[1.0] * 6)
    assert ratio(slow[:5], runs(*[0.5] * 5))[1:] == (None, None)
    fast = runs(1 / 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6)
    assert ratio(slow, fast) == pytest.approx((3.5, 1.0, 6.0)), "the extremes of six miss 2 times in 64"
    nine = ratio(runs(*[1.0] * 9), runs(*(1 / place for place in range(1, 10))))
    assert nine == pytest.approx((5.0, 2.0, 8.0)), "the second of nine misses 20 times in 512"


def test_prefix_hits_are_shares_or_unknown():
    assert prefix_hits({"prompt_tokens": 200, "pool": {"prefix_hit_tokens": 50}}) == 0.25
    assert prefix_hits({"prompt_tokens": 200, "pool": {}}) is None and prefix_hits({"prompt_tokens": 200}) is None


def test_saving_is_that_of_the_paper():
    assert Steps(used=[4, 6], alone=[8, 12]).saving == 0.5


def test_the_dense_rectangle_keeps_pads_and_finished_rows():
    # Step 0: 4 + 2 tokens in 2 x 4 places. Step 1: the second row is over, 5 in 2 x 5.
    assert dense_share([4, 2], [2, 1]) == pytest.approx((6 / 8 + 5 / 10) / 2)
    assert dense_share([3, 3], [5, 5]) == 1.0


def test_the_paper_stands_beside_ours():
    sharing = [
        {"mode": mode, "workload": workload, "rows": rows, "saving": rows / 10}
        for mode in ("samples", "beams")
        for workload in ("short", "all")
        for rows in (2, 4)
    ]
    prefixes = [{"shots": "1-shot", "saving": 0.25}]
    gains = {("1-shot", "paged"): Spread(1.5, None, None), ("5-shot", "paged"): Spread(2.5, None, None)}
    rows = rows_beside_paper([{"dense": 0.3, "paged": 0.955}], sharing, prefixes, gains)
    assert rows[:2] == [
        ["KV memory that holds tokens, without pages", "20 to 38 %", "30.0 %"],
        ["KV memory that holds tokens, with pages", "96 %", "95.5 %"],
    ]
    stated = {what: (paper, ours) for what, paper, ours in rows}
    beams = stated["blocks saved, beams, all prompts (the paper: ShareGPT)"]
    assert beams == ("44 to 66 %", "20.0 to 40.0 %, with 2, 4 rows a prompt")
    assert stated["throughput, 5-shot prefix of 341 tokens: paged, over dense"] == ("3.58 x", "2.50 x")
    assert stated["blocks saved, 1-shot prefix of 80 tokens"] == ("not stated", "25.0 %")


def test_a_watch_looks_while_the_block_runs_and_when_it_ends():
    values = iter(range(1000))
    with Watch(lambda: next(values), every=0.001) as watch:
        time.sleep(0.05)
    moments, seen = zip(*watch.seen)
    assert list(seen) == list(range(len(seen))) and len(seen) > 3
    assert moments[0] < 0.05 <= moments[-1] and list(moments) == sorted(moments)


def test_thinning_keeps_both_ends():
    assert thinned(list(range(5)), most=10) == [0, 1, 2, 3, 4]
    few = thinned(list(range(1000)), most=11)
    assert len(few) == 11 and (few[0], few[-1]) == (0, 999)


class StandIn:
    """Models of a run, as far as an adapter of another engine looks at them."""

    class options:
        dtype, model = "float32", "any"

    class baseline:
        @staticmethod
        def save_pretrained(folder):
            StandIn.saved = folder

    tokenizer = baseline


def test_vllm_is_told_to_be_greedy_and_to_keep_no_prefix(monkeypatch):
    made = []

    class LLM:
        def __init__(self, folder, **settings):
            made.append((folder == StandIn.saved, settings["enable_prefix_caching"], settings["dtype"]))

        def generate(self, inputs, wanted, use_tqdm):
            made.append(wanted)
            outputs = [types.SimpleNamespace(token_ids=(*one["prompt_token_ids"], 9)) for one in inputs]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **settings: settings
    assert VLLM(StandIn).obstacle() == "vllm is not installed"
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert VLLM(StandIn).generate([[1, 2], [3]], Lengths(7, stops=False)) == [[1, 2, 9], [3, 9]]
    assert made == [(True, False, "float32"), {"temperature": 0.0, "max_tokens": 7, "ignore_eos": True}]


def test_openvino_needs_a_converted_model(monkeypatch):
    found = {"openvino_genai"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in found or None)
    monkeypatch.delenv(FOLDER, raising=False)
    assert OpenVINO(StandIn).obstacle() == f"{FOLDER} names no folder of a converted model"
    monkeypatch.setenv(FOLDER, "somewhere")
    assert OpenVINO(StandIn).obstacle() is None
    found.clear()
    assert OpenVINO(StandIn).obstacle() == "openvino-genai is not installed"
