"""The parts of ``hf-paged eval gpu``: bars that are met and missed, checks that fail on what is wrong, and inputs."""

import dataclasses
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

from hf_paged_evals.gpu import cases, generation, models, peers, recorder, sanitized, timing
from hf_paged_evals.gpu.bars import BARS, describe, judge
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.pages import Heads, OpCase, OpOptions, make_arguments
from hf_paged_evals.gpu.stages import (
    compile_ahead,
    equality,
    op_accuracy,
    plan_sweep,
    prefill,
    random_numbers,
    sanitizers,
)
from hf_paged_kernels import ops, reference
from hf_paged_kernels.triton import kernel_calls

CPU = torch.device("cpu")
HEADS = {"heads": "32/8x128", "block": 16, "dtype": "bfloat16"}


@pytest.fixture
def context(tmp_path) -> Context:
    now = time.monotonic()
    return Context(CPU, True, tmp_path, recorder.Recorder(tmp_path / recorder.FILE, "test", now), now + 60)


def lines_of(context) -> list[dict]:
    return recorder.read_lines(context.out)


def run_of(gain: float = 1.0) -> list[dict]:
    """Lines of a run that meets every bar exactly at `gain` 1; a lower gain misses those of speed."""

    def line(stage: str, kind: str, **values) -> dict:
        return {"t": 1.0, "stage": stage, "kind": kind, **values}

    lines = [line("run", "begin", dry=False, card="a card"), line("environment", "card", name="H", sheet_tb_s=3.35)]
    for rows, context in ((32, 1024), (64, 4096)):
        size = {"rows": rows, "context": context, **HEADS}
        lines.append(line("decode", "decode", engine="paged", of_copy=0.8 * gain, tb_s=2.4 * gain, **size))
        lines.append(line("decode_peers", "decode_peer", engine="paged", tb_s=1.9 * gain, **size))
        lines.append(line("decode_peers", "decode_peer", engine="sdpa flash", tb_s=1.5, **size))
        lines.append(line("decode_peers", "decode_peer", engine="xformers split-K, pages of 64", tb_s=2.0, **size))
        lines.append(line("decode_peers", "decode_peer", engine="flashinfer", tb_s=9.0, **size))
    prompt = {"rows": 1, "queries": 8192, "context": 8192, "heads": "32/8x128"}
    lines.append(line("prefill", "prefill", engine="paged", tflops=350.0 * gain, **prompt))
    for rows, floor, dense in ((32, 8.0, 17.28), (1, 5.0, 13.5)):
        step = {"rows": rows, "floor_ms": floor, "copy_tb_s": 3.0}
        lines.append(line("model_step", "step", engine="dense eager", step_ms=dense, over_floor=9.0, **step))
        ours = {"step_ms": floor * 1.35 / gain, "over_floor": 1.35 / gain, "counters": {"replayed_steps": 30}}
        lines.append(line("model_step", "step", engine="paged captured", **ours, **step))
    for engine, speed in (("dense eager", 1000.0), ("paged eager", 1.0), ("paged captured", 2500.0 * gain)):
        lines.append(line("generate", "generate", engine=engine, rows=32, tokens_s=speed))
    lines.append(line("generate_batch", "generate", engine="generate_batch", rows=32, tokens_s=5000 / 3, note="n"))
    lines.append(line("op_accuracy", "op_accuracy", cases=9, wrong=0, largest_error={}))
    lines.append(line("op_accuracy", "moves_bits", op="copy_blocks", right=True))
    lines.append(
        line("op_accuracy", "padded_replay", right=True, padding_gives_zeros=True, padding_writes_nothing=True)
    )
    lines.append(line("equality", "mode", engine="paged captured", mode="greedy", rows=8, equal_rows=8))
    lines += [line("sanitizers", "sanitizer", tool=tool, findings=0, ran=True, tail="") for tool in sanitizers.TOOLS]
    return [*lines, *(line(stage, "end", outcome="done", seconds=1.0) for stage in ("op_accuracy", "equality"))]


def verdicts(lines) -> dict[str, str]:
    return {one.bar: one.verdict for one in judge(lines)}


def test_bars_are_met_by_a_run_that_just_reaches_them():
    found = judge(run_of())
    assert {one.verdict for one in found} == {"met"} and {one.card for one in found} == {"H"}
    assert "H: 14 met, 0 missed, 0 not measured" in describe(found)


def test_bars_of_speed_are_missed_by_a_slower_run():
    found = verdicts(run_of(0.99))
    missed = {name for name, verdict in found.items() if verdict == "missed"}
    exact = {"wrong ops, against float64", "modes whose float32 tokens differ from dense"}
    assert found.keys() - missed == exact | {f"findings of {tool}" for tool in sanitizers.TOOLS}


@pytest.mark.parametrize(
    "kind, change, bar",
    [
        ("op_accuracy", {"wrong": 1}, "wrong ops, against float64"),
        ("moves_bits", {"right": False}, "wrong ops, against float64"),
        ("padded_replay", {"padding_writes_nothing": False}, "wrong ops, against float64"),
        ("padded_replay", {"right": False}, "wrong ops, against float64"),
        ("mode", {"equal_rows": 7}, "modes whose float32 tokens differ from dense"),
        ("sanitizer", {"findings": 2}, "findings of memcheck"),
    ],
)
def test_a_wrong_result_misses_its_bar(kind, change, bar):
    lines = [{**line, **change} if line["kind"] == kind else line for line in run_of()]
    assert verdicts(lines)[bar] == "missed"


def test_without_lines_no_bar_is_measured_and_each_says_why():
    ended = {"t": 2.0, "stage": "prefill", "kind": "end", "outcome": "killed after its 30 seconds", "seconds": 30.0}
    refused = {"t": 1.0, "stage": "sanitizers", "kind": "refused", "what": "memcheck", "why": "it is absent"}
    over = {"t": 2.0, "stage": "sanitizers", "kind": "end", "outcome": "done", "seconds": 1.0}
    found = {one.bar: one for one in judge([ended, refused, over])}
    assert {one.verdict for one in found.values()} == {"not measured"} and len(found) == len(BARS)
    assert found["prefill of 8,192 tokens, head size 128"].note == "prefill: killed after its 30 seconds"
    assert found["findings of memcheck"].note == "memcheck: it is absent"
    assert found["1B shape, 32 rows: generate over dense"].note == "generate was not run"


def test_a_captured_step_counts_only_if_steps_were_replayed():
    eager = {"counters": {"eager_steps": {"hooks of others": 3}}}
    lines = [{**line, **eager} if line["kind"] == "step" else line for line in run_of()]
    found = [one for one in judge(lines) if one.bar.startswith("8B shape")]
    assert {one.verdict for one in found} == {"not measured"}
    assert {one.note for one in found} == {"no step was replayed: 3 x hooks of others"}


def test_equality_that_was_cut_short_is_not_met():
    lines = [line for line in run_of() if (line["stage"], line["kind"]) != ("equality", "end")]
    assert verdicts(lines)["modes whose float32 tokens differ from dense"] == "not measured"


def test_a_sanitizer_that_did_not_come_to_its_end_proves_nothing():
    ran = f"{sanitized.DONE}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizers.verdict(ran) == {"findings": 0, "ran": True, "tail": ran}
    assert sanitizers.verdict("========= ERROR SUMMARY: 3 errors")["findings"] == 3
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    assert sanitizers.verdict(hazards)["findings"] == 2
    assert sanitizers.verdict("killed")["findings"] is None
    lines = [{**line, "ran": False} if line["kind"] == "sanitizer" else line for line in run_of()]
    assert verdicts(lines)["findings of racecheck"] == "not measured"


CASE = OpCase(((40, 9), (33, 33), (1, 1)), Heads(9, 3, 64), torch.float32, 16, OpOptions(20, 5.0, True))


def test_pages_hold_nan_wherever_no_token_was_stored():
    given = make_arguments(CASE, CPU)
    slots = given.key_cache.transpose(1, 2).reshape(-1, 3, 64)  # [slots, num_kv_heads, dim]
    assert int((~slots.isnan().any(-1).any(-1)).sum()) == 31  # Of 74 tokens, 43 are new.
    assert slots[given.slot_mapping].isnan().all() and len(set(given.slot_mapping.tolist())) == 43
    assert not make_arguments(CASE, CPU, with_nan=False).key_cache.isnan().any()


def test_the_check_of_ops_can_fail(monkeypatch):
    assert op_accuracy.check(CASE, CPU, 0)[1]
    right = ops.write_and_attend
    monkeypatch.setattr(ops, "write_and_attend", lambda *arguments: right(*arguments) * 1.001)
    error, is_right = op_accuracy.check(CASE, CPU, 0)
    assert not is_right and error == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("codes", cases.CODES, ids=str)
def test_the_check_of_quantised_pages_can_fail(codes, monkeypatch):
    case = dataclasses.replace(CASE, codes=codes)
    assert op_accuracy.check(case, CPU, 0)[1]
    right = ops.write_and_attend

    def with_a_wrong_code(query, key, value, *pages):
        return right(query, key, value * 1.1, *pages)

    monkeypatch.setattr(ops, "write_and_attend", with_a_wrong_code)
    assert not op_accuracy.check(case, CPU, 0)[1]


def test_bytes_of_quantised_pages():
    case = OpCase(((100, 1), (20, 1)), Heads(8, 2, 64), codes=torch.int8)
    given = make_arguments(OpCase(((16, 1),), Heads(8, 2, 64), codes=torch.int8), CPU)
    vectors = 2 * 120 * 2
    assert case.kv_bytes == vectors * (64 + 4) and case.engine == "paged, int8 pages"
    assert given.key_cache.dtype == torch.int8 and [x.shape[-1] for x in given.scales] == [1, 1]
    assert sum(x.isnan().sum() for x in given.scales) == 2 * 2 * (16 + 1)  # A block too many, and the new token's slot.


def test_an_op_that_gives_other_bits_each_time_is_wrong(monkeypatch):
    right, calls = ops.paged_attention, itertools.count(1)
    monkeypatch.setattr(ops, "paged_attention", lambda *arguments: right(*arguments) + 1e-7 * next(calls))
    error, is_right = op_accuracy.check(CASE, CPU, 0)
    assert error <= op_accuracy.TOLERANCE[torch.float32] and not is_right


def test_the_padded_replay_sees_what_padding_writes(context, monkeypatch):
    right = ops.write_and_attend

    def with_one_write_too_many(query, key, value, keys, values, slots, *rest):
        if (slots < 0).any():
            keys[0, 0, 0] = 7.0
        return right(query, key, value, keys, values, slots, *rest)

    case = OpCase(((33, 1), (5, 1)), cases.HEADS[1])
    found = op_accuracy.check_padded_replay(context, case)
    assert found["padding_gives_zeros"] and found["padding_writes_nothing"] and found["right"]
    monkeypatch.setattr(ops, "write_and_attend", with_one_write_too_many)
    assert not op_accuracy.check_padded_replay(context, case)["padding_writes_nothing"]


def test_peers_compute_what_the_pages_hold():
    decode = OpCase(((64, 1), (64, 1)), Heads(4, 2, 32), torch.float32)
    prompt = OpCase(((30, 30), (30, 30)), Heads(4, 2, 32), torch.float32)
    for case, make in ((decode, peers.DECODE["sdpa flash"]), (prompt, peers.PREFILL["sdpa flash"])):
        given = make_arguments(case, CPU, with_nan=False)
        expected = reference.paged_attention(*given.attend())
        torch.testing.assert_close(make(given, case)().reshape(expected.shape), expected)


def test_causal_operations_are_counted_once():
    heads = Heads(2, 1, 8)
    assert prefill.flop(OpCase(((3, 3),), heads)) == 4 * 2 * 8 * 6
    assert prefill.flop(OpCase(((10, 1), (10, 2)), heads)) == 4 * 2 * 8 * (10 + 9 + 10)


def test_philox_gives_the_published_numbers():
    assert random_numbers.philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = (1 << 64) - 1
    assert random_numbers.philox(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_number_of_a_draw_is_found_by_thread_turn_and_part():
    """132 processors draw with 270,336 threads, four numbers each a turn."""
    threads, count = 132 * 8 * 256, 32 * 128256
    for place, (turn, part, thread) in {0: (0, 0, 0), threads + 5: (0, 1, 5), 4 * threads + 7: (1, 0, 7)}.items():
        word = random_numbers.philox(7, thread, 3 + turn)[part]
        uniform = torch.tensor(word * 2.0**-32, dtype=torch.float32) + 2.0**-33
        expected = float(-uniform.double().log())
        assert random_numbers.exponential_at(7, 12, place, count, 132) == pytest.approx(expected, rel=1e-6)


def test_changed_plans_are_launched_and_put_back():
    chosen = kernel_calls.attention_plans
    query = torch.empty(1, 32, 128, dtype=torch.bfloat16)
    caches = [torch.empty(1, 8, 16, 128, dtype=torch.bfloat16) for _ in "kv"]
    rows = torch.zeros(1, 256, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    device = compile_ahead.Device("sm90", 132)
    stages = {}
    for name, change in plan_sweep.CHANGES.items():
        with plan_sweep.plans_changed(change):
            call, *_ = kernel_calls.attention_calls(device, query.clone(), query, *caches, *rows, 0.1)
        stages[name] = call.options["num_stages"]
    assert stages["2 stages"] == 2 and stages["4 stages"] == 4 and stages["as chosen"] == 3
    assert kernel_calls.attention_plans is chosen


def test_every_call_of_the_later_stages_is_compiled_ahead():
    todo = set(compile_ahead.all_cases(is_dry=False))
    for stage_cases in (cases.accuracy_cases(False), cases.decode_cases(False), cases.prefill_cases(False)):
        assert set(stage_cases) <= todo
    sizes = {(len(case.rows), case.rows[0][0], str(case.heads), case.block_size) for case in cases.decode_cases(False)}
    assert {(32, 1024, "32/8x128", 16), (64, 4096, "32/8x128", 16)} <= sizes


def test_dense_steps_begin_behind_the_filled_cache():
    model, lengths = models.llama(models.TINY, CPU), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = generation.dense_from_cache(model, torch.randint(3, 90, (2, 17)))(4)
    hook.remove()
    assert out.shape == (2, 21) and lengths == [1, 1, 1, 1]


def test_weights_that_a_step_reads():
    untied = models.llama(models.TINY, CPU)
    everything = sum(parameter.nbytes for parameter in untied.parameters())
    assert models.read_weights(untied) == everything - 97 * 64 * 2
    tied = models.llama(models.Shape("tied", 64, 64, 2, 4, 2, 16, 97, is_tied=True), CPU)
    assert models.read_weights(tied) == sum(parameter.nbytes for parameter in tied.parameters())


def test_a_step_is_the_difference_of_two_calls(context, monkeypatch):
    now = [0.0]

    def generate(tokens: int) -> None:
        now[0] += 0.3 + 0.01 * tokens

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert generation.step_ms(context, generate, 1, 5, 3) == pytest.approx(10)


def test_the_gap_of_a_difference_is_that_of_its_logits():
    model = models.llama(models.TINY, CPU, torch.float32, 0.2)
    prompt, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)
    other = expected.clone()
    other[0, 5] = (other[0, 5] + 1) % 97
    assert equality.gap(model, "sdpa", expected, expected, mask) == 0
    with torch.no_grad():
        logits = model(expected[:1, 2:5]).logits[0, -1]  # Without its pads.
    wanted = float(logits[expected[0, 5]] - logits[other[0, 5]])
    assert wanted > 0 and equality.gap(model, "sdpa", expected, other, mask) == pytest.approx(wanted, rel=1e-4)


def test_calls_that_may_share_kernels_are_compiled_by_one_worker():
    todo = compile_ahead.all_cases(is_dry=False)
    shares = compile_ahead.divide(todo, 14)
    assert sorted(map(id, todo)) == sorted(id(case) for share in shares for case in share) and len(shares) == 14
    places = {}
    for number, share in enumerate(shares):
        for case in share:
            assert places.setdefault(compile_ahead.kernels_of(case), number) == number


def test_a_stage_goes_on_after_what_it_attempts(context):
    with context.attempt("a step"):
        raise RuntimeError("too large")
    refused, error = lines_of(context)
    assert (refused["what"], refused["why"]) == ("a step", "RuntimeError: too large")
    assert "test_gpu_parts.py" in error["error"]


def test_a_line_is_plain_json(context):
    context.say("found", number=float("inf"), many=(1, 2.0), inner={1: torch.float32}, long="x" * 5000, none=None)
    (line,) = lines_of(context)
    assert line["number"] == "inf" and line["many"] == [1, 2.0] and line["inner"] == {"1": "torch.float32"}
    assert len(line["long"]) < 1000 and line["none"] is None and line["stage"] == "test"


def test_the_sanitized_calls_import_no_transformers():
    code = "import sys\nfrom hf_paged_evals.gpu import sanitized\nassert 'transformers' not in sys.modules"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
