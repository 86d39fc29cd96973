"""Recordings do the work of their function again, and a function whose work none can do again is refused."""

import contextlib
import ctypes
import functools

import pytest
import torch
from torch.nn import functional as F

from hf_paged.execution import recorder as recorder_module
from hf_paged.execution.op_recorder import OpRecorder
from hf_paged.execution.recorder import GraphRecorder, UncapturableError

ROWS, SIZE = 3, 4


@pytest.fixture
def work():
    """A function over tensors that stay where they are, and these: views, writes in place, lists, constants."""
    torch.manual_seed(0)
    weight, inputs, store = torch.randn(SIZE, SIZE), torch.randn(ROWS, SIZE), torch.zeros(ROWS, SIZE)

    def run() -> torch.Tensor:
        states = F.linear(inputs, weight).view(ROWS, 2, 2).transpose(0, 1)
        first, second = states.chunk(2, dim=0)
        first += 1  # Through a view: `states` and what is stored see it.
        store.copy_(states.transpose(0, 1).reshape(ROWS, SIZE))
        last = torch.cat([first, second], dim=2)[:, torch.tensor([2, 0])]
        return torch.softmax(last.reshape(2, SIZE) * torch.tensor(2.0), dim=-1)

    return run, weight, inputs, store


def check_replays(recording, run, inputs, store):
    for _ in range(3):
        inputs.normal_()
        expected, stored = run(), store.clone()
        store.zero_()
        assert torch.equal(recording.replay(), expected)
        assert torch.equal(store, stored)


@torch.no_grad()
def test_operators_are_called_again_over_the_same_tensors(work):
    run, weight, inputs, store = work
    recording = OpRecorder().record(run)
    check_replays(recording, run, inputs, store)
    weight.neg_()
    check_replays(recording, run, inputs, store)


@torch.no_grad()
def test_a_replay_runs_no_python_code_of_the_function(work):
    run, _, inputs, store = work
    calls = []

    def counted():
        calls.append(None)
        return run()

    recording = OpRecorder().record(counted)
    recording.replay()
    assert len(calls) == 1


@torch.no_grad()
def test_results_of_operator_lists_are_new_tensors(work):
    run, _, inputs, _ = work
    recording = OpRecorder().record(run)
    first = recording.replay()
    kept = first.clone()
    inputs.normal_()
    assert not torch.equal(recording.replay(), first)
    assert torch.equal(first, kept)


X = torch.randn(ROWS, SIZE)
REFUSED = {
    "item": (lambda: X * X.max().item(), "_local_scalar_dense"),
    "branch": (lambda: X * 2 if X.sum() > 100 else X, "_local_scalar_dense"),
    "mask": (lambda: X[X > 0], "index.Tensor"),
    "nonzero": (lambda: X.nonzero(), "nonzero"),
    "equal": (lambda: X * torch.equal(X, X), "equal"),
    "tolist": (lambda: torch.tensor((X + 1).tolist()), "tolist"),
    "numpy": (lambda: torch.from_numpy((X + 1).numpy()), "numpy"),
    "address": (lambda: X + (X + 1).data_ptr(), "data_ptr"),
    "noise": (lambda: torch.rand(ROWS, SIZE), "rand"),
    "dropout": (lambda: F.dropout(X, 0.5), "random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_replay_could_not_know_is_refused(name):
    function, text = REFUSED[name]
    state = torch.get_rng_state()
    with torch.no_grad(), pytest.raises(UncapturableError, match=text):
        OpRecorder().record(function)
    if name in ("noise", "dropout"):
        assert torch.equal(torch.get_rng_state(), state), "a refused draw has drawn"


def test_an_obstacle_that_the_function_hides_is_seen():
    def hides():
        with contextlib.suppress(UncapturableError):
            return X * X.max().item()
        return X + 1

    with torch.no_grad(), pytest.raises(UncapturableError, match="_local_scalar_dense"):
        OpRecorder().record(hides)


def test_memory_of_the_recording_that_no_operator_returned_is_refused():
    def smuggles():
        states = X + 1
        return torch.frombuffer(memory(states), dtype=torch.float32) * 2

    def memory(tensor):  # As a library would that gets at the address in C.
        address = tensor.untyped_storage().data_ptr()
        return (ctypes.c_char * (tensor.numel() * 4)).from_address(address)

    with torch.no_grad(), pytest.raises(UncapturableError, match="no operator of torch returned"):
        OpRecorder().record(smuggles)


def test_an_error_of_the_function_is_raised_and_leaves_no_mode():
    def fails():
        raise ValueError("of the function")

    with pytest.raises(ValueError, match="of the function"):
        OpRecorder().record(fails)
    assert not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack()


# CUDA's graphs, against an imitation of torch.cuda.


class FakeGraph:
    """Runs what was captured when it is replayed. While it is captured, nothing runs on the device."""

    def __init__(self):
        self.work = None

    def replay(self):
        self.work()


class FakeCuda:
    """The part of ``torch.cuda`` that `GraphRecorder` calls, and a log of the calls."""

    CUDAGraph = FakeGraph

    def __init__(self):
        self.log, self.handles = [], iter(range(1, 10))

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(("enter", stream))
        yield
        self.log.append(("leave", stream))

    def Stream(self):
        return FakeStream(self.log, "side")

    def current_stream(self):
        return FakeStream(self.log, "current")

    def graph_pool_handle(self):
        return next(self.handles)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(("capture", pool, stream.name, capture_error_mode))
        yield
        self.log.append(("captured", pool))


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(("wait", self.name, other.name))


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(recorder_module.torch, "cuda", fake)
    recorder_module._capture_stream.cache_clear()
    yield fake
    recorder_module._capture_stream.cache_clear()


def captured(recorder, run):
    """A recording by an imitated graph: the work that it replays is given to it afterwards."""
    recording = recorder.record(run)
    recording._graph.work = lambda: recording._result.copy_(run())
    return recording


@torch.no_grad()
def test_graphs_are_warmed_up_beside_the_current_stream_and_share_their_memory(work, cuda):
    run, _, inputs, store = work
    recorder = GraphRecorder(torch.device("cpu"))
    assert recorder.must_be_alone
    recordings = [captured(recorder, run) for _ in range(2)]
    order = [entry for entry in cuda.log if entry[0] != "enter" and entry[0] != "leave"]
    one = [("wait", "side", "current"), ("wait", "current", "side"), ("capture", 1, "side", "thread_local")]
    assert order == [*one, ("captured", 1)] * 2
    for recording in recordings:
        check_replays(recording, run, inputs, store)


@torch.no_grad()
def test_graphs_copy_their_results_into_one_tensor(cuda):
    sizes = {rows: torch.randn(rows, SIZE) for rows in (4, 2, 8)}
    recorder = GraphRecorder(torch.device("cpu"))
    recordings = {rows: captured(recorder, functools.partial(torch.mul, x, 2)) for rows, x in sizes.items()}
    for rows, recording in recordings.items():
        assert torch.equal(recording.replay(), sizes[rows] * 2)
    places = [recording._result.data_ptr() for recording in recordings.values()]
    assert places[0] == places[1] != places[2], "a larger result needs room of its own"


def test_a_capture_that_fails_leaves_no_graph(cuda):
    recorder, calls = GraphRecorder(torch.device("cpu")), []

    def fails_while_captured():
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return X

    before = len(recorder_module._graphs)
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fails_while_captured)
    assert len(recorder_module._graphs) == before


def test_a_forked_child_keeps_its_graphs(cuda, monkeypatch):
    monkeypatch.setattr(recorder_module, "_kept", [])
    recording = captured(GraphRecorder(torch.device("cpu")), lambda: X * 1)
    recorder_module._keep_graphs()
    graph = recording._graph
    del recording
    assert any(kept is graph for kept, _ in recorder_module._kept)
