"""Criteria of any kind end the rows of a batch where dense ends them, though packed rows are at different steps."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

import hf_paged
from hf_paged_integrations.serving.streaming import BatchTextIteratorStreamer
from support import texts, zoo
from support.packing import LENGTHS, SAMPLE, compare, pair
from support.threads import in_threads

RAGGED = [13, 4, 30, 9, 21, 1]
ENDS = {"one end": {}, "many ends": {"eos_token_id": [2, *range(60, 70)]}, "no end": {"eos_token_id": None}}
DECODING = pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])


class EveryRow(StoppingCriteria):
    """As lm-eval's `MultiTokenEOSCriteria`: ends all rows at once, when each has had its token."""

    def __init__(self, rows: int, after: int = 3):
        self.done, self.after, self.widths = [False] * rows, after, []

    def __call__(self, input_ids, scores, **kwargs):
        self.widths.append(input_ids.shape)
        for row, ids in enumerate(input_ids.tolist()):
            self.done[row] |= ids[-1] % 6 == 0 and input_ids.shape[1] > max(RAGGED) + self.after
        return all(self.done)


class EachRow(EveryRow):
    """Ends a row when it has had its token, also if that was long ago."""

    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.tensor(self.done)


class FirstRow(EveryRow):
    """Ends all rows by what the first one holds."""

    def __call__(self, input_ids, scores, **kwargs):
        self.widths.append(input_ids.shape)
        return int(input_ids[0, -1]) % 6 == 0


class WritesOver(EveryRow):
    """Takes the end tokens out of sight of the criteria that come after it, which is too late for packed rows."""

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[:, -1] = 5
        return False


def both(models, kind, inputs, **options):
    """Sequences and criteria, dense and packed; random numbers end in one state."""
    outputs, criteria, states = [], [], []
    for model in models:
        criteria.append(kind(len(inputs["input_ids"])))
        torch.manual_seed(0)
        outputs.append(
            model.generate(**inputs, **{**LENGTHS, "max_new_tokens": 40, **options}, stopping_criteria=[criteria[-1]])
        )
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the generator ended in another state"
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and stats.page_reads and not stats.gathers
    return outputs, criteria


@DECODING
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", [EveryRow, EachRow, FirstRow])
@pytest.mark.parametrize("blocks", [None, 40], ids=["room", "waves"])
def test_rows_end_where_dense_ends_them(kind, ends, options, blocks):
    models = pair(blocks=blocks)
    outputs, criteria = both(models, kind, zoo.prompts(RAGGED), **ENDS[ends], **options)
    assert torch.equal(*outputs) and vars(criteria[0]) == vars(criteria[1])
    assert 30 < outputs[1].shape[1] < 70 or ends == "no end" or kind is EveryRow


def test_some_rows_were_ahead(monkeypatch):
    """Or the tests above would show nothing: rows have generated more than the answer holds."""
    from hf_paged.generation.generate_call import GenerateCall

    counts, close = [], GenerateCall.close
    monkeypatch.setattr(GenerateCall, "close", lambda self: (counts.append(list(self._counts)), close(self))[1])
    outputs, _ = both(pair(), FirstRow, zoo.prompts(RAGGED), eos_token_id=None)
    assert torch.equal(*outputs) and max(counts[0]) > outputs[1].shape[1] - max(RAGGED)


def test_duplicates_and_returned_sequences():
    models = pair()
    outputs, criteria = both(
        models, lambda rows: EachRow(2 * rows), zoo.prompts([13, 4]), **SAMPLE, num_return_sequences=2
    )
    assert torch.equal(*outputs) and vars(criteria[0]) == vars(criteria[1])


def test_end_tokens_that_are_written_over_leave_no_call_waiting():
    _, paged = pair()
    criteria = StoppingCriteriaList([WritesOver(6), EosTokenCriteria([*range(3, 5), *range(6, 97)])])
    options = {**LENGTHS, "eos_token_id": None, "stopping_criteria": criteria}
    (output,) = in_threads(lambda: paged.generate(**zoo.prompts(RAGGED), **options))
    assert output.shape[0] == 6 and not hf_paged.stats(paged).used_blocks


def test_a_row_that_the_pool_cannot_hold_leaves_no_call_waiting():
    _, paged = pair(blocks=10)
    options = {**LENGTHS, "max_new_tokens": 30, "stopping_criteria": [EveryRow(2, after=99)]}
    (error,) = in_threads(lambda: paged.generate(**zoo.prompts([4, 36]), **options))
    assert isinstance(error, hf_paged.OutOfBlocksError)
    assert not hf_paged.stats(paged).used_blocks


def test_a_cancelled_call_ends():
    _, paged = pair()
    cancellation = hf_paged.Cancellation()

    def cancel(input_ids, scores, **kwargs):
        if input_ids.shape[1] > 34:
            cancellation.cancel()
        return False

    output = paged.generate(
        **zoo.prompts(RAGGED), **{**LENGTHS, "max_new_tokens": 99}, stopping_criteria=[cancel, cancellation]
    )
    assert 34 < output.shape[1] < 129


@DECODING
@pytest.mark.parametrize("end", [{}, {"max_time": 1e3}, {"stop_strings": ["a", "q"]}], ids=str)
def test_rows_that_go_on_after_they_are_finished(end, options):
    """Without an end token dense writes no pads: rows go on until all are finished."""
    tokenizer = {"tokenizer": texts.tokenizer()} if "stop_strings" in end else {}
    compare(pair(), zoo.prompts(RAGGED), **options, **end, **tokenizer, eos_token_id=None, max_new_tokens=40)


@pytest.mark.parametrize("ends", ENDS)
def test_a_streamer_of_rows_hears_no_token_past_an_end(ends):
    models, told = pair(), []
    for model in models:
        streamer = BatchTextIteratorStreamer(texts.tokenizer(after=" "), timeout=30)
        model.generate(
            **zoo.prompts(RAGGED), **{**LENGTHS, **ENDS[ends]}, streamer=streamer, stopping_criteria=[EachRow(6)]
        )
        told.append(["".join(streamer.row(row)) for row in range(6)])
    assert told[0] == told[1]
    assert hf_paged.stats(models[1]).packed_calls == 1


@pytest.mark.needs_module("lm_eval")
@DECODING
@pytest.mark.parametrize("until", [["a", "\n\n"], ["</s>", "b", "cd"]], ids=str)
def test_the_criterion_of_lm_eval(until, options):
    from lm_eval.models.utils_hf import stop_sequences_criteria

    models, tokenizer, found = pair(), texts.tokenizer(), []
    inputs = zoo.prompts(RAGGED)
    for model in models:
        criteria = stop_sequences_criteria(tokenizer, until, inputs["input_ids"].shape[1], 6)
        torch.manual_seed(0)
        output = model.generate(
            **inputs, max_length=90, pad_token_id=0, use_cache=True, stopping_criteria=criteria, **options
        )
        found.append((output.tolist(), [one.done_tracker for one in criteria], torch.get_rng_state().tolist()))
    assert found[0] == found[1] and True in found[1][1][0]
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and stats.page_reads
