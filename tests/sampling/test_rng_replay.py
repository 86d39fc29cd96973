"""Replayed noise is dense's, row by row, however late a row comes and however a device draws."""

import contextlib

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged.reasons import Reason
from hf_paged.sampling import rng_replay
from hf_paged.sampling.rng_replay import Draws, ReplayedNoise, draws_of, is_unseeded
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare, pair
from support.places import drawn_by_place
from support.threads import in_threads

CPU = torch.device("cpu")
BATCH, VOCAB = 21, 50
WAYS = {"in order": contextlib.nullcontext, "by place": drawn_by_place}


@pytest.fixture(params=WAYS)
def way(request):
    """How the device draws."""
    with WAYS[request.param]():
        yield request.param


def dense_noise(num_steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The noise of each step as dense draws it, and the generator's state before it; the last one is the end."""
    torch.manual_seed(0)
    noise, states = [], [torch.get_rng_state()]
    for _ in range(num_steps):
        noise.append(torch.empty(BATCH, VOCAB).exponential_(1))
        states.append(torch.get_rng_state())
    torch.set_rng_state(states[0])
    return noise, states


def test_an_experiment_tells_how_a_device_draws(way, monkeypatch):
    assert rng_replay.draws_of(CPU) is (Draws.IN_ORDER if way == "in order" else Draws.WHOLE)
    state = torch.get_rng_state()
    find_out = draws_of.__wrapped__
    assert find_out(torch.device("meta")) is Draws.UNKNOWN
    monkeypatch.setattr(torch, "multinomial", lambda shares, _, generator: shares.argmax(-1, keepdim=True))
    assert find_out(CPU) is Draws.UNKNOWN
    assert torch.equal(torch.get_rng_state(), state), "it has generators of its own"


def test_rows_get_their_noise_in_any_order(way):
    expected, states = dense_noise(6)
    noise = ReplayedNoise(BATCH, VOCAB)
    asked = [(0, range(BATCH)), (3, [2, 9, 20]), (1, [0]), (1, [7, 8]), (5, [20]), (2, [3, 4, 5, 15]), (4, range(8))]
    for step, rows in asked:
        assert torch.equal(noise.rows(step, list(rows)), expected[step][list(rows)])
    noise.forget_before(4)
    assert torch.equal(noise.rows(4, [1, 19]), expected[4][[1, 19]])
    assert not torch.equal(torch.get_rng_state(), states[0]), "a call that begins now starts from other numbers"
    noise.close(5)
    assert torch.equal(torch.get_rng_state(), states[5])


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_generator_ends_where_dense_would_leave_it(way, num_steps):
    _, states = dense_noise(4)
    noise = ReplayedNoise(BATCH, VOCAB)
    noise.rows(2, [0])
    noise.close(num_steps)
    assert torch.equal(torch.get_rng_state(), states[num_steps]), "behind the rows, or ahead of them"


def test_a_generator_that_others_have_moved_is_left_alone(way):
    noise = ReplayedNoise(BATCH, VOCAB)
    noise.rows(0, [0])
    torch.rand(1)
    state = torch.get_rng_state()
    noise.close(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kept", [0, 2])
def test_little_noise_is_kept_for_late_rows(way, kept, monkeypatch):
    expected, _ = dense_noise(4)
    step_bytes = BATCH * VOCAB * 4
    monkeypatch.setattr(rng_replay, "_KEPT_BYTES", kept * step_bytes + 1)
    noise = ReplayedNoise(BATCH, VOCAB)
    draws, draw = [], ReplayedNoise._draw_chunk
    monkeypatch.setattr(ReplayedNoise, "_draw_chunk", lambda self, *drawn: draws.append(drawn) or draw(self, *drawn))
    noise.rows(3, [0])
    num_draws = len(draws)
    for step in range(4):
        assert torch.equal(noise.rows(step, [4]), expected[step][[4]])
        assert len(draws) == num_draws + min(step + 1, 4 - kept), "the newest steps are kept"
    noise.forget_before(4)
    assert not noise._kept and not noise._states


def test_rows_are_drawn_in_the_dtype_of_their_shares(way):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        expected = torch.empty(BATCH, VOCAB, dtype=dtype).exponential_(1)
        torch.set_rng_state(state)
        assert torch.equal(ReplayedNoise(BATCH, VOCAB, dtype).rows(0, [1, 2, 17]), expected[[1, 2, 17]])


CASES = {
    "queue": {"blocks": 14},
    "few tokens a step": {"token_budget": 5},
    "room for all": {"token_budget": 64},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"repetition_penalty": 1.3}], ids=str)
def test_sampled_tokens_are_those_of_dense(way, case, options, monkeypatch):
    steps, rows = [], ReplayedNoise.rows
    monkeypatch.setattr(ReplayedNoise, "rows", lambda self, step, some: steps.append(step) or rows(self, step, some))
    compare(pair(**CASES[case]), zoo.prompts([9, 3, 14, 6, 11]), **SAMPLE, **options, max_new_tokens=24)
    assert (steps != sorted(steps)) == (case != "room for all"), "rows come late"


def test_rows_that_end_at_different_steps_sample_as_dense_does(way):
    models, inputs = pair(token_budget=7), zoo.prompts([4, 12, 7, 9])
    ends = [token for token in range(3, 90, 6)]
    output = compare(models, inputs, **SAMPLE, eos_token_id=ends, max_new_tokens=40)
    lengths = {int((row[12:] != 0).sum()) for row in output}
    assert len(lengths) > 1


def test_a_lone_call_samples_as_dense_does(way):
    compare(pair(), zoo.prompts([9]), **SAMPLE)


def test_calls_at_the_same_time_differ_and_a_later_one_is_denses(way):
    dense, paged = pair()
    torch.manual_seed(0)
    inputs = zoo.prompts([9, 4])
    calls = [lambda: paged.generate(**inputs, **SAMPLE, **LENGTHS, min_new_tokens=20)] * 3
    first, second, third = in_threads(*calls)
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)
    compare((dense, paged), inputs, **SAMPLE)


def test_a_call_after_one_that_failed_samples_as_dense_does(way):
    class Failing(LogitsProcessor):
        row_wise = True

        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 14:
                raise ValueError("no more")
            return scores

    models, inputs = pair(), zoo.prompts([9, 4])
    with pytest.raises(ValueError, match="no more"):
        models[1].generate(**inputs, **SAMPLE, **LENGTHS, logits_processor=LogitsProcessorList([Failing()]))
    compare(models, inputs, **SAMPLE)


def test_a_call_of_rows_without_a_distribution_fails_alone(way):
    class Broken(LogitsProcessor):
        row_wise = True

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, float("nan")) if input_ids.shape[1] > 14 else scores

    dense, paged = pair()
    inputs = zoo.prompts([9, 4])
    torch.manual_seed(0)
    broken = LogitsProcessorList([Broken()])
    with pytest.raises(RuntimeError, match="probability tensor"):
        paged.generate(**inputs, **SAMPLE, **LENGTHS, logits_processor=broken)
    compare((dense, paged), inputs, **SAMPLE)


def test_a_device_whose_numbers_cannot_be_drawn_again_samples_freely_until_torch_is_seeded(monkeypatch):
    _, paged = pair()
    inputs = zoo.prompts([9, 4])
    for module in ("hf_paged.sampling.rng_replay", "hf_paged.generation.generate_call"):
        monkeypatch.setattr(f"{module}.draws_of", lambda device: Draws.UNKNOWN)
    monkeypatch.setattr("hf_paged_integrations.transformers.eligibility.draws_of", lambda device: Draws.UNKNOWN)
    monkeypatch.setattr(rng_replay, "_SEED_AT_IMPORT", torch.seed())
    if not is_unseeded():
        monkeypatch.setattr(rng_replay, "_LEAST_RANDOM_SEED", 0)
    outputs = [paged.generate(**inputs, **SAMPLE, **LENGTHS) for _ in range(2)]
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 2 and not stats.fallbacks
    assert not torch.equal(outputs[0][:, :20], outputs[1][:, :20])
    torch.manual_seed(0)
    paged.generate(**inputs, **SAMPLE, **LENGTHS)
    assert hf_paged.stats(paged).fallbacks == {Reason.DEVICE_NOISE.text: 1}
    paged.generate(**inputs, do_sample=False, **LENGTHS)
    assert hf_paged.stats(paged).packed_calls == 3


class PlacedGenerator:
    """A generator whose state is a seed and an offset, as a GPU's is; nothing is drawn from it."""

    def __init__(self, state: torch.Tensor):
        self._state = state.clone()  # [seed, offset]

    def get_state(self) -> torch.Tensor:
        return self._state

    def get_offset(self) -> int:
        return int(self._state[1])

    def set_offset(self, offset: int) -> None:
        self._state[1] = offset

    def initial_seed(self) -> int:
        return int(self._state[0])


@pytest.fixture
def placed(fake_device, monkeypatch):
    """The state ``[seed, offset]`` of the default generator of the first device."""
    state = torch.tensor([2**50, 8])
    module = torch.get_device_module(fake_device.device)
    monkeypatch.setattr(type(module), "get_rng_state", lambda self, device: state.clone())
    monkeypatch.setattr(type(module), "set_rng_state", lambda self, new, device: state.copy_(new))
    monkeypatch.setattr(rng_replay, "_generator", lambda new, device: PlacedGenerator(new))
    monkeypatch.setattr(rng_replay, "draws_of", lambda device: Draws.WHOLE)
    return state


def test_a_call_leaves_the_generator_far_from_the_numbers_of_its_own_steps(fake_device, placed):
    noise = ReplayedNoise(2, VOCAB, device=fake_device.device)
    noise._part_from_others()
    assert placed.tolist() == [2**50, 8 + 2**32], "the next step of this call begins a few offsets on"
    noise.close(0)
    assert placed.tolist() == [2**50, 8]


def test_a_device_is_seeded_with_torch_or_by_itself(fake_device, placed, monkeypatch):
    monkeypatch.setattr(rng_replay, "_SEED_AT_IMPORT", 2**41)
    monkeypatch.setattr(rng_replay, "_seeds", {})
    torch.manual_seed(2**41)
    assert is_unseeded() and is_unseeded(fake_device.device)
    placed[0] = 2**51
    assert is_unseeded() and not is_unseeded(fake_device.device), "another seed than before"
    monkeypatch.setattr(rng_replay, "_seeds", {})
    assert is_unseeded(fake_device.device)
    placed[0] = 7
    monkeypatch.setattr(rng_replay, "_seeds", {})
    assert not is_unseeded(fake_device.device), "no seed of chance"
    placed[0] = 2**51
    torch.manual_seed(1)
    assert not is_unseeded(fake_device.device)


def test_a_device_without_memory_is_not_taken_for_one_without_generators(fake_device, monkeypatch):
    find_out = draws_of.__wrapped__
    with fake_device.memory_left(1000), pytest.raises(torch.OutOfMemoryError):
        find_out(fake_device.device)
    assert find_out(fake_device.device) is Draws.IN_ORDER
