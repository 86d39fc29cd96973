"""Pending tokens reach the places of the rows that run with them, on the device, and the host when it asks."""

import pytest
import torch

from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.memory.block_pool import BlockPool
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk


def chunk(length: int, start: int, is_ahead: bool = False) -> Chunk:
    request = Request(list(range(100, 100 + length)), [BlockPool(8, 4)])
    request.runs_ahead = is_ahead
    return Chunk(request, start, length + is_ahead)


def ids_of(chunks, padding: int = 0) -> torch.Tensor:
    """The input ids of a step as they are uploaded."""
    return torch.tensor([[token for one in chunks for token in one.tokens] + [0] * padding])


def test_rows_in_the_order_of_the_step_before():
    chunks = [chunk(3, 3, True), chunk(5, 5, True)]
    pending = PendingTokens(torch.tensor([7, 8]), [one.request for one in chunks])
    ids = ids_of(chunks, padding=2)
    pending.put_into(ids, chunks)
    assert ids.tolist() == [[7, 8, 0, 0]] and pending.read() == [7, 8]


def test_rows_among_prompts_after_others_have_left():
    first, prompt, last = chunk(3, 3, True), chunk(4, 1), chunk(6, 6, True)
    gone, waits = chunk(2, 2).request, chunk(9, 9).request
    pending = PendingTokens(torch.tensor([5, 6, 7, 8]), [gone, last.request, first.request, waits])
    chunks = [first, prompt, last]
    ids = ids_of(chunks)
    pending.put_into(ids, chunks)
    assert ids.tolist() == [[7, 101, 102, 103, 6]]


def test_a_step_without_such_rows_is_left_alone():
    chunks = [chunk(3, 0), chunk(6, 5)]
    pending = PendingTokens(torch.tensor([5]), [chunks[1].request])
    ids = ids_of(chunks)
    pending.put_into(ids, chunks)
    assert ids.tolist() == [[100, 101, 102, 105]]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["in order", "out of order"])
def test_nothing_waits_for_the_device_until_the_tokens_are_read(fake_device, order):
    chunks = [chunk(3, 3, True), chunk(5, 5, True), chunk(2, 2, True)]
    tokens, ids = torch.tensor([7, 8, 9]).to(fake_device.device), ids_of(chunks).to(fake_device.device)
    with fake_device.watch() as traffic:
        pending = PendingTokens(tokens, [chunks[number].request for number in order])
        pending.precede()
        pending.put_into(ids, chunks)
    assert (traffic.downloads, traffic.waits) == (1, 0)
    assert traffic.uploads == (order != [0, 1, 2])
    with fake_device.watch() as traffic:
        assert pending.read() == [7, 8, 9]
    assert traffic.waits == 1
    assert ids.tolist() == [[7 + order.index(number) for number in range(3)]]
