"""Rows end by numbers where they end by transformers' criteria, which look at tensors."""

import time

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria
from transformers.generation import stopping_criteria as upstream

import hf_paged
from hf_paged.sampling.stopping import StoppingRules

CRITERIA = {
    "none": [],
    "length": [MaxLengthCriteria(12)],
    "one end": [EosTokenCriteria(3)],
    "several ends": [EosTokenCriteria([3, 5]), EosTokenCriteria(torch.tensor([7]))],
    "all": [MaxLengthCriteria(14, max_position_embeddings=100), EosTokenCriteria([3]), MaxTimeCriteria(1000.0)],
    "time is over": [MaxTimeCriteria(1.0, initial_timestamp=time.time() - 2), EosTokenCriteria([3])],
}


@pytest.mark.parametrize("name", CRITERIA)
def test_rows_end_as_the_criteria_say(name):
    criteria = CRITERIA[name]
    generator = torch.Generator().manual_seed(0)
    for length in (1, 11, 12, 13, 14, 20):
        rows = torch.randint(0, 9, (40, length), generator=generator)
        expected = StoppingCriteriaList(criteria)(rows, None).tolist()
        assert StoppingRules(criteria).are_over(rows[:, -1].tolist(), [length] * 40) == expected


def test_a_cancelled_row_ends():
    cancellation = hf_paged.Cancellation()
    rules = StoppingRules([cancellation])
    assert rules.are_over([1, 2], [5, 6]) == [False, False]
    cancellation.cancel()
    assert rules.are_over([1, 2], [5, 6]) == [True, True]


def test_rows_past_the_model_s_length_are_warned_of(monkeypatch):
    warned = []
    monkeypatch.setattr(upstream.logger, "warning_once", warned.append)
    rules = StoppingRules([MaxLengthCriteria(30, max_position_embeddings=20)])
    assert rules.are_over([1], [20]) == [False] and not warned
    assert rules.are_over([1], [21]) == [False] and "maximum length (20)" in warned[0]


def test_other_criteria_are_not_for_numbers():
    class Mine(MaxLengthCriteria):
        pass

    for kind in (StopStringCriteria, Mine):
        assert not StoppingRules.KINDS.issuperset({kind})
