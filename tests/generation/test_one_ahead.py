"""Steps that run one ahead: the tokens of dense, no step too many, and nothing from past a row's end."""

import functools
import threading

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.sampling.rng_replay import no_replay
from support import one_ahead, packing, zoo
from support.packing import LENGTHS, compare, pair, watch_steps
from support.parity import assert_rows_equal
from support.threads import in_threads

ENDLESS = {**LENGTHS, "eos_token_id": None}


@pytest.fixture
def seen(monkeypatch):
    return one_ahead.force(monkeypatch)


def ending_at(dense, inputs, count: int) -> dict:
    """Options with which the only row of a call ends with its `count`-th token."""
    new = dense.generate(**inputs, **ENDLESS)[0, inputs["input_ids"].shape[1] :].tolist()
    assert new[count - 1] not in new[: count - 1] + inputs["input_ids"][0].tolist(), "another seed"
    return {**LENGTHS, "eos_token_id": new[count - 1]}


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_read(seen):
    dense, paged = pair(token_budget=64)
    inputs, options = zoo.prompts([9, 7]), {**ENDLESS, "max_new_tokens": 4}
    assert torch.equal(paged.generate(**inputs, **options), dense.generate(**inputs, **options))
    later = [("run", 2), ("choose", 2), ("read", 2)]
    assert seen.events == [("choose", 2), *later * 3, ("read", 2)]


def test_rows_that_end_by_their_length_run_no_step_too_many(seen, monkeypatch):
    dense, paged = pair(token_budget=64)
    inputs, options = zoo.prompts([9, 7]), {**ENDLESS, "max_new_tokens": 4}
    wanted = dense.generate(**inputs, **options)
    ran = watch_steps(monkeypatch, lambda inputs: inputs.input_ids.numel())
    assert torch.equal(paged.generate(**inputs, **options), wanted)
    assert ran[-4:] == [16, 2, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_what_runs_past_the_end_of_a_row_is_dropped(count, seen, monkeypatch):
    dense, paged = pair(token_budget=64)
    inputs = zoo.prompts([9], seed=2)
    options = ending_at(dense, inputs, count)
    wanted = dense.generate(**inputs, **options)
    ran = watch_steps(monkeypatch, lambda inputs: inputs.input_ids.numel())
    assert torch.equal(paged.generate(**inputs, **options), wanted) and wanted.shape[1] == 9 + count
    assert ran[-count - 1 :] == [9, *[1] * count], "one chunk too many, no more"
    # The next turn of the chat finds what the row has stored, and not a token more.
    prompt = {"input_ids": torch.cat([wanted, torch.full((1, 5), 50)], dim=1)}
    before = hf_paged.stats(paged).prefix_hit_tokens
    assert torch.equal(paged.generate(**prompt, **ENDLESS), dense.generate(**prompt, **ENDLESS))
    assert hf_paged.stats(paged).prefix_hit_tokens - before == (9 + count - 1) // 4 * 4
    assert seen.num_ahead


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("options", [{}, {"eos_token_id": None}, {"eos_token_id": list(range(2, 20))}])
def test_rows_of_many_lengths(name, options, seen):
    compare(pair(name=name), zoo.prompts([13, 4, 30, 9, 21, 1, 9, 4]), **options)
    assert seen.num_ahead


def test_equal_prompts_start_from_the_same_logits(seen):
    models = pair(blocks=40)
    compare(models, {name: value.repeat(4, 1) for name, value in zoo.prompts([10, 7]).items()})
    assert seen.num_ahead


def test_a_row_that_fills_the_pool_ends_in_peace(seen):
    """Only a token past its end would need another block."""
    dense, paged = pair(blocks=3)
    inputs = zoo.prompts([9], seed=2)
    options = ending_at(dense, inputs, 4)
    assert torch.equal(paged.generate(**inputs, **options), dense.generate(**inputs, **options))
    assert seen.num_ahead == 3
    with pytest.raises(hf_paged.OutOfBlocksError, match="needs 4 blocks, 3 of 3 are free"):
        paged.generate(**inputs, **ENDLESS)


def test_rows_that_may_have_ended_push_no_other_out(seen):
    models = pair(blocks=18)
    compare(models, zoo.prompts([13, 4, 30, 9, 21, 1] * 4), eos_token_id=list(range(2, 12)))
    assert hf_paged.stats(models[1]).total_blocks == 18, "the budget was exceeded"
    assert seen.num_ahead


def refuse(model, token: int, error: type[Exception]):
    """Let the model raise when it is to run a token; returns the hook."""

    def strike(_, args):
        if bool((args[0] == token).any()):
            raise error(f"no {token} here")

    return model.model.embed_tokens.register_forward_pre_hook(strike)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_an_error_past_the_end_of_a_row_is_none(beside, seen):
    """Dense never runs the end token."""
    dense, paged = pair(token_budget=64)
    inputs = zoo.prompts([9], seed=2)
    options, other = ending_at(dense, inputs, 3), zoo.prompts([6], seed=4)
    hook = refuse(paged, options["eos_token_id"], ValueError)
    wanted = dense.generate(**inputs, **options)
    try:
        if beside:
            both = {**LENGTHS, "eos_token_id": options["eos_token_id"]}
            expected = dense.generate(**other, **both)
            found, company = in_threads(
                lambda: paged.generate(**inputs, **options), lambda: paged.generate(**other, **both)
            )
            assert torch.equal(company, expected)
        else:
            found = paged.generate(**inputs, **options)
    finally:
        hook.remove()
    assert torch.equal(found, wanted) and seen.num_ahead


def test_an_error_before_the_end_of_a_row_reaches_its_call(seen):
    dense, paged = pair(token_budget=64)
    inputs = zoo.prompts([9], seed=2)
    hook = refuse(paged, ending_at(dense, inputs, 3)["eos_token_id"], ValueError)
    try:
        with pytest.raises(ValueError, match="here"):
            paged.generate(**inputs, **ENDLESS)
    finally:
        hook.remove()
    assert seen.num_ahead and not hf_paged.stats(paged).used_blocks


@pytest.mark.parametrize("ends", [True, False], ids=["past the end", "before the end"])
def test_scores_that_are_no_distribution(ends, seen):
    """Nothing can be sampled from them: an error, but not of a row that has ended."""
    dense, paged = pair(token_budget=64)
    inputs = zoo.prompts([9], seed=2)
    options = {**LENGTHS, "do_sample": True, "top_k": 1}
    end = ending_at(dense, inputs, 3)["eos_token_id"]
    spoilt = []

    def spoil(_, args):
        spoilt.append(bool((args[0] == end).any()))

    hooks = [
        paged.model.embed_tokens.register_forward_pre_hook(spoil),
        paged.lm_head.register_forward_hook(lambda _, args, out: out.fill_(float("nan")) if spoilt[-1] else None),
    ]
    try:
        with no_replay():
            if ends:
                wanted = dense.generate(**inputs, **options, eos_token_id=end)
                assert torch.equal(paged.generate(**inputs, **options, eos_token_id=end), wanted)
            else:
                with pytest.raises(RuntimeError, match="probability tensor"):
                    paged.generate(**inputs, **options, eos_token_id=None)
    finally:
        for hook in hooks:
            hook.remove()
    assert any(spoilt) and seen.num_ahead


def test_random_numbers_are_those_of_steps_in_turn(monkeypatch):
    _, paged = pair(token_budget=64)
    options, outputs = {**ENDLESS, "do_sample": True, "top_k": 30}, []
    for is_ahead in (False, True):
        seen = one_ahead.force(monkeypatch) if is_ahead else None
        torch.manual_seed(0)
        with no_replay():
            outputs.append(paged.generate(**zoo.prompts([9, 4, 12]), **options))
    assert seen is not None and seen.num_ahead
    assert torch.equal(*outputs)


IN_TURN = {
    "a processor looks at the tokens": {"repetition_penalty": 1.3},
    "the random numbers of dense are replayed": packing.SAMPLE,
    "scores are returned": {"return_dict_in_generate": True, "output_scores": True},
    "a cache is handed over": {"past_key_values": DynamicCache},
}


@pytest.mark.parametrize("why", IN_TURN)
def test_calls_that_need_their_tokens_run_in_turn(why, seen):
    models = pair(token_budget=64)
    outputs = []
    for model in models:
        torch.manual_seed(0)
        made = {"past_key_values": lambda model=model: DynamicCache(config=model.config)}
        options = {key: made[key]() if key in made else value for key, value in IN_TURN[why].items()}
        output = model.generate(**zoo.prompts([9]), **ENDLESS, **options)
        outputs.append(getattr(output, "sequences", output))
    assert torch.equal(*outputs)
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and not seen.num_ahead


def test_calls_of_both_kinds_share_steps(seen, monkeypatch):
    """Such steps are read at once; when the last call that needs that has left, steps run ahead again."""
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([5 + seed, 3], seed=seed) for seed in range(6)]
    kinds = [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {}] * 2
    options = [{**ENDLESS, "max_new_tokens": 20 + 7 * number, **kind} for number, kind in enumerate(kinds)]
    expected = [dense.generate(**inputs, **some) for inputs, some in zip(prompts, options)]
    rows = watch_steps(monkeypatch, lambda inputs: len(inputs.sample_index))
    calls = [functools.partial(paged.generate, **inputs, **some) for inputs, some in zip(prompts, options)]
    for inputs, want, got in zip(prompts, expected, in_threads(*calls)):
        assert not isinstance(got, Exception), got
        assert_rows_equal(dense, inputs, want, got)
    assert max(rows) > 4 and seen.num_ahead


def test_an_interrupt_between_two_steps_in_flight_costs_the_driver_alone(seen, monkeypatch):
    """One step is launched and not noted, the one before it is not read: another call reads it and goes on."""
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([9], seed=1), zoo.prompts([7, 5], seed=2)]
    options = {**ENDLESS, "max_new_tokens": 40}
    wanted = [dense.generate(**inputs, **options) for inputs in prompts]
    read, raised = PendingTokens.read, []

    def interrupted(self):
        if len(self._index_of) == 3 and len(seen.events) > 20 and not raised:
            raised.append(threading.get_ident())
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(PendingTokens, "read", interrupted)
    idents, got = [0, 0], [None, None]

    def call(number):
        idents[number] = threading.get_ident()
        try:
            got[number] = paged.generate(**prompts[number], **options)
        except KeyboardInterrupt:
            got[number] = KeyboardInterrupt

    in_threads(lambda: call(0), lambda: call(1))
    assert raised, "the calls never shared a step"
    for ident, want, result in zip(idents, wanted, got):
        assert result is KeyboardInterrupt if ident == raised[0] else torch.equal(result, want)
