"""The order of work on a device whose streams differ from thread to thread."""

import contextlib
import copy
import random
import threading

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged import PagedConfig
from hf_paged.attention import paged_attention
from hf_paged.cache import batch_state
from hf_paged.compat import devices
from hf_paged.execution import home_stream
from hf_paged.execution.home_stream import catch_up, on_home_stream
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.memory.kv_storage import KVStorage
from hf_paged_integrations.transformers import upstream_loop
from support import zoo
from support.fake_streams import FakeStreams, Stream
from support.packing import LENGTHS
from support.threads import in_threads


@contextlib.contextmanager
def streams_of(fake_device):
    """Give the fake device streams; note what touches pages, weights, logits and tokens."""
    streams, place = FakeStreams(), fake_device.device

    def noted(owner, name, what, **touched):
        real = getattr(owner, name)

        def run(self, *arguments):
            things = {kind: thing(self, *arguments) for kind, thing in touched.items()}
            streams.queue(what, place, **things)
            return real(self, *arguments)

        patch.setattr(owner, name, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "module_of", lambda device: streams)
        patch.setattr(devices, "keep_for", streams.keep_for)
        for name in ("write", "write_and_attend", "copy_blocks"):
            noted(KVStorage, name, f"pages.{name}", writes=lambda storage, *_: storage)
        for name in ("attend", "gather"):
            noted(KVStorage, name, f"pages.{name}", reads=lambda storage, *_: storage)
        noted(ModelRunner, "run", "step", reads=lambda *_: "weights", writes=lambda runner, *_: runner.buffers)
        noted(GenerateCall, "choose", "choice", reads=lambda call, *_: call)
        noted(GenerateCall, "accept", "tokens", writes=lambda call, *_: call)
        yield streams


def on_device(device):
    """The tiny llama on a device, in a pool in which all calls of a test have room."""
    model = copy.deepcopy(zoo.pair("llama")[1]).to(device)  # The pair is shared by all tests.
    hf_paged.configure(model, PagedConfig(block_size=4, memory_budget="512KiB", token_budget=16))
    return model


KINDS = {
    "greedy": {},
    "own thread chooses": {"no_repeat_ngram_size": 30},
    "beams": {"num_beams": 2},
    "direct": None,
}


def work_of(kind, paged, inputs, streams, stream, place):
    """A thread's work: it writes the weights, calls the model and reads what it gets, all on a stream of its own."""

    def run():
        with streams.stream(stream):
            streams.queue(f"input of {kind}", place, writes=threading.get_ident())
            if KINDS[kind] is None:
                cache = DynamicCache(config=paged.config)
                with torch.no_grad():
                    for _ in range(4):
                        paged(inputs["input_ids"][:, :3], past_key_values=cache)
                return cache.layers[0].keys
            return paged.generate(**inputs, **LENGTHS, **KINDS[kind])

    return run


def run_all(fake_device, kinds, places, seed=0):
    """Run calls of some kinds at the same time, each on the stream with the number in `places`; returns the streams."""
    paged, place = on_device(fake_device.device), fake_device.device
    prompts = [zoo.prompts([9, 4], seed=seed + number) for number in range(len(kinds))]
    moved = [{name: tensor.to(place) for name, tensor in inputs.items()} for inputs in prompts]
    with streams_of(fake_device) as streams:
        own = [Stream(f"stream {number}") for number in range(3)]
        with streams.stream(own[0]):
            streams.queue("optimizer", place, writes="weights")
            paged.generate(**moved[0], **LENGTHS)
        works = zip(kinds, moved, places)
        results = in_threads(*(work_of(kind, paged, inputs, streams, own[at], place) for kind, inputs, at in works))
    for kind, inputs, at, result in zip(kinds, prompts, places, results):
        assert not isinstance(result, Exception), result
        if KINDS[kind] is not None:
            assert torch.equal(result.cpu(), zoo.pair("llama")[0].generate(**inputs, **LENGTHS, **KINDS[kind]))
        streams.races += [] if (id(result), own[at]) in streams.kept else [f"what {kind} returned is not kept"]
    return streams


@pytest.mark.parametrize("seed", range(6))
def test_what_threads_queue_on_streams_of_their_own_runs_in_order(seed, fake_device):
    chance = random.Random(seed)
    kinds, places = chance.choices(list(KINDS), k=4), chance.choices(range(3), k=4)
    streams = run_all(fake_device, kinds, places, seed)
    assert streams.num_visits and not streams.races, streams.races[:3]


MUTATIONS = {
    "a call stays on its own stream": [upstream_loop],
    "a cache stays on its own stream": [batch_state, paged_attention],
    "attention stays on its own stream": [paged_attention],
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_stays_on_its_own_stream_is_found(mutation, fake_device, monkeypatch):
    for module in MUTATIONS[mutation]:
        monkeypatch.setattr(module, "on_home_stream", lambda *places: home_stream._AT_HOME)
    assert run_all(fake_device, ["direct", "greedy", "direct", "own thread chooses"], [1, 2, 0, 1]).races


def test_nobody_pays_where_all_streams_are_the_same(fake_device):
    paged = on_device(fake_device.device)
    inputs = {name: tensor.to(fake_device.device) for name, tensor in zoo.prompts([9, 4]).items()}
    with streams_of(fake_device) as streams:
        paged.generate(**inputs, **LENGTHS)
        paged.generate(**inputs, **LENGTHS, num_beams=2)
    assert not streams.num_visits and not streams.kept and not streams.races


def test_nothing_is_asked_on_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "streams", lambda device: pytest.fail("the CPU has one order"))
    with on_home_stream(torch.device("cpu"), torch.device("cpu")) as lend:
        assert lend(3) == 3


def test_a_thread_is_back_on_its_own_streams_and_device_afterwards(fake_device):
    """However it leaves, and with several devices."""
    with streams_of(fake_device) as streams:
        own = Stream("own")
        with streams.stream(own), streams.device(1), pytest.raises(KeyError):
            with on_home_stream(fake_device.device, fake_device.second):
                assert streams.current_stream(fake_device.second) is not own
                assert streams.current_device() == 1
                raise KeyError
        assert streams.current_device() == 0 and streams.current_stream(fake_device.device) is not own
    with streams_of(fake_device) as streams, streams.stream(own):
        streams.queue("before", fake_device.device, writes="thing")
        catch_up(fake_device.device)
        home = streams.default_stream(fake_device.device)
        assert home.seen[own] == 1 and own.seen[home] == 0
        with on_home_stream(fake_device.device):
            streams.queue("inside", fake_device.device, writes="thing")
        assert own.seen[home] == 1
    assert not streams.races


@pytest.mark.parametrize("kind", ["tensor", "output"])
def test_all_tensors_of_an_output_are_lent(fake_device, kind):
    tensors = [torch.zeros(2, device=fake_device.device) for _ in range(3)]
    result = tensors[0] if kind == "tensor" else {"sequences": tensors[0], "scores": (tensors[1], [tensors[2], None])}
    with streams_of(fake_device) as streams:
        own = Stream("own")
        with streams.stream(own), on_home_stream(fake_device.device) as lend:
            assert lend(result) is result
    expected = tensors[:1] if kind == "tensor" else tensors
    assert streams.kept == {(id(tensor), own) for tensor in expected}
