"""A step as tensors: right whatever was prepared in its buffers before, in one place, and brought there by one copy."""

import contextlib

import pytest
import torch

from hf_paged.execution.step_buffers import StepBuffers, StepLayout, StepSize
from hf_paged.execution.step_inputs import prepare_inputs
from support.fake_groups import FakeGroup, Rows
from support.interrupts import Interrupt, InterruptedAt
from support.step_lists import assert_describes

CPU = torch.device("cpu")


def tensors_of(inputs):
    tensors = [inputs.input_ids, inputs.position_ids, inputs.sample_index]
    for _, metadata in inputs.layers.values():
        tensors += [tensor for tensor in vars(metadata).values() if isinstance(tensor, torch.Tensor)]
    return tensors


class Decoding(Rows):
    """Rows whose next token is known as soon as a step has run."""

    def __init__(self, window=6, budget=64):
        super().__init__(FakeGroup(200), FakeGroup(200, window, layer=1), budget=budget)

    def next_chunks(self):
        self.planned = self.scheduler.schedule()
        return self.planned.chunks

    def finish(self):
        self.scheduler.commit(self.planned)
        for chunk in self.planned.chunks:
            if chunk.samples:
                chunk.request.tokens.append(chunk.end)


def test_all_tensors_of_a_step_lie_in_one():
    rows, buffers = Decoding(), StepBuffers(CPU)
    for length in (9, 2, 5):
        rows.arrive(range(length))
    tensors = tensors_of(prepare_inputs(rows.next_chunks(), rows.groups, buffers))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 128 == tensors[0].data_ptr() % 128 for tensor in tensors), "not aligned"


def test_tensors_stay_until_a_step_outgrows_them():
    rows, buffers = Decoding(budget=512), StepBuffers(CPU, StepSize(64, 16, (16, 16)))
    request = rows.arrive(range(20))
    places = []
    for _ in range(12):
        inputs = prepare_inputs(rows.next_chunks(), rows.groups, buffers)
        places.append([tensor.data_ptr() for tensor in tensors_of(inputs)])
        rows.finish()
    assert all(place == places[0] for place in places) and buffers.room == StepSize(64, 16, (16, 16))
    request.tokens += range(100)  # More than there is room for, in tokens and in blocks.
    chunks = rows.next_chunks()
    assert_describes(prepare_inputs(chunks, rows.groups, buffers), chunks, rows.groups)
    assert buffers.room == StepSize(128, 16, (64, 32))


def test_no_two_tensors_share_an_element():
    layout = StepLayout(StepSize(5, 3, (7, 1)))
    taken = [index for place in layout.places.values() for index in range(layout.num_elements)[place]]
    for columns in layout.columns:
        row = range(layout.table_stride)[columns]
        taken += [layout.tables + number * layout.table_stride + column for number in range(3) for column in row]
    assert len(taken) == len(set(taken)) and max(taken) < layout.num_elements
    assert layout.end(2) == layout.num_elements - layout.table_stride


def test_rows_of_one_token_pad_a_step():
    rows, buffers = Decoding(), StepBuffers(CPU)
    for length in (9, 2, 5):
        rows.arrive(range(length))
    bucket = StepSize(8, 8, (32, 16))
    shapes = []
    for step in range(8):
        chunks = rows.next_chunks()
        if step == 0:
            prepare_inputs(chunks, rows.groups, buffers)
        else:
            inputs = prepare_inputs(chunks, rows.groups, buffers, padded_to=bucket)
            assert_describes(inputs, chunks, rows.groups, num_pads=5)
            shapes.append([(tensor.shape, tensor.data_ptr()) for tensor in tensors_of(inputs)])
        rows.finish()
    assert all(shape == shapes[0] for shape in shapes)
    assert inputs.layers[0][1].block_tables.shape == (8, 32)


@pytest.mark.parametrize("size", [StepSize(2, 2, (32, 16)), StepSize(9, 8, (32, 16)), StepSize(8, 8, (32, 1))], ids=str)
def test_a_step_that_rows_of_one_token_do_not_pad_is_refused(size):
    rows, buffers = Decoding(), StepBuffers(CPU)
    for length in (9, 2, 5):
        rows.arrive(range(length))
    rows.next_chunks()
    rows.finish()
    with pytest.raises(ValueError, match="do not pad a step of .* run it as it is"):
        prepare_inputs(rows.next_chunks(), rows.groups, buffers, padded_to=size)


def test_an_interrupt_at_any_line_spoils_no_later_step():
    """Rows move, grow, slide their window and leave between the steps; the tables are written in place."""
    countdown, ran = 0, []
    while countdown == 0 or ran[-1]:
        countdown += 1
        rows, buffers = Decoding(), StepBuffers(CPU, StepSize(64, 16, (4, 4)))
        requests = [rows.arrive(range(length)) for length in (9, 3, 8, 5, 7)]
        prepare_inputs(rows.next_chunks(), rows.groups, buffers)
        rows.finish()
        rows.scheduler.remove(requests[0])
        chunks = rows.next_chunks()
        with InterruptedAt(countdown) as interrupted, contextlib.suppress(Interrupt):
            prepare_inputs(chunks, rows.groups, buffers)
        ran.append(interrupted.fired)
        rows.scheduler.abort(rows.planned)
        rows.scheduler.remove(requests[2])
        for _ in range(6):
            chunks = rows.next_chunks()
            assert_describes(prepare_inputs(chunks, rows.groups, buffers), chunks, rows.groups)
            rows.finish()
    assert countdown > 100


def test_one_copy_that_nothing_waits_for_brings_a_step_to_a_device(fake_device):
    rows, buffers = Decoding(), StepBuffers(fake_device.device)
    for length in (9, 3, 8, 5, 7):
        rows.arrive(range(length))
    for step in range(8):
        chunks = rows.next_chunks()
        with fake_device.watch() as traffic:
            inputs = prepare_inputs(chunks, rows.groups, buffers)
        assert all(tensor.device == fake_device.device for tensor in tensors_of(inputs))
        assert_describes(inputs, chunks, rows.groups)
        rows.finish()
        if step > 0:  # The first step allocates, and finds that its block tables need more room.
            assert (traffic.uploads, traffic.downloads, traffic.waits) == (1, 0, 0)


def test_memory_that_is_being_copied_is_not_written(fake_device, monkeypatch):
    """Events that have not happened are waited for, and two steps are prepared before the first one must have."""
    log = []

    class Event(torch.Event):
        def record(self, stream):
            log.append(("copied", id(self)))

        def query(self):
            return False

        def synchronize(self):
            log.append(("waited", id(self)))

    monkeypatch.setattr(torch, "Event", Event)
    rows, buffers = Decoding(), StepBuffers(fake_device.device, StepSize(64, 16, (16, 16)))
    rows.arrive(range(9))
    for _ in range(4):
        prepare_inputs(rows.next_chunks(), rows.groups, buffers)
        rows.finish()
    first, second = [event for what, event in log if what == "copied"][:2]
    assert first != second
    assert log == [(what, event) for event in (first, second) * 2 for what in ("waited", "copied")]


def test_a_copy_that_an_interrupt_left_unrecorded_is_waited_for(fake_device, monkeypatch):
    rows = Decoding()
    rows.arrive(range(9))
    chunks = rows.next_chunks()

    class Stuck(torch.Event):
        def record(self, stream):
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "Event", Stuck)
        buffers = StepBuffers(fake_device.device, StepSize(64, 16, (16, 16)))
    with contextlib.suppress(Interrupt):
        prepare_inputs(chunks, rows.groups, buffers)
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    for _ in range(2):
        with contextlib.suppress(Interrupt):
            prepare_inputs(chunks, rows.groups, buffers)
    assert waits == [fake_device.device]
