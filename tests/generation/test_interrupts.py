"""Interrupts, errors of signal handlers and forks: each costs its own call, and leaves nothing behind."""

import functools
import gc
import os
import random
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged.errors import UnsupportedError
from hf_paged.execution import packed_cache
from hf_paged.memory import kv_pool
from hf_paged.models import forward_context, registry
from hf_paged.sampling import categorical, sampler
from hf_paged.sampling.row_streamer import RowStreamer
from support import zoo
from support.interrupts import Interrupt, InterruptedAt
from support.packing import LENGTHS, pair
from support.parity import assert_rows_equal
from support.threads import in_threads

SHORT = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
ENDLESS = {**LENGTHS, "eos_token_id": None}  # Without a processor that would keep calls from choosing together.


def settled(model) -> None:
    """Every block is back and no call is left, at most a step later."""
    (pool,) = registry.pools_under(model)
    deadline = time.monotonic() + 10
    while hf_paged.stats(model).used_blocks and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.check_integrity()
    assert not hf_paged.stats(model).used_blocks, "blocks are left in use"
    assert not pool.reservations and not pool.num_waiting
    for engine in pool.engines:
        assert not engine.is_running and not engine._is_driven and not engine.scheduler.running
    assert not any(group.blocks.reserved for group in pool.groups.values())


both_ways = pytest.mark.usefixtures("is_ahead")
MODES = {"greedy": {}, "beams": {"num_beams": 2}, "sample": {"do_sample": True}}


@both_ways
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_at_any_line_costs_its_own_call(mode):
    """A sample of the lines that a call runs; another call runs beside it all the time."""
    dense, paged = pair(blocks=60)
    inputs, other = zoo.prompts([9, 5, 7], seed=3), zoo.prompts([12], seed=8)
    wanted = dense.generate(**other, **SHORT)
    paged.generate(**inputs, **SHORT)

    def run(countdown: int | None) -> InterruptedAt:
        results: list = []
        beside = threading.Thread(target=lambda: results.append(paged.generate(**other, **SHORT)))
        tracer = InterruptedAt(countdown)
        beside.start()
        try:
            with tracer:
                paged.generate(**inputs, **{**SHORT, **MODES[mode]})
        except Interrupt:
            pass
        beside.join(60)
        assert not beside.is_alive(), f"a call hangs after an interrupt at {tracer.fired}"
        assert len(results) == 1 and torch.equal(results[0], wanted), f"interrupt at {tracer.fired}"
        settled(paged)
        return tracer

    num_lines = min(run(None).num_lines for _ in range(3))  # On a busy machine some runs wait, line after line.
    chance, fired = random.Random(mode), 0
    for _ in range(20):
        fired += run(chance.randint(1, num_lines)).fired is not None
    assert fired > 10
    assert torch.equal(paged.generate(**other, **SHORT), wanted)


class Timeout(Exception):
    """Raised by the signal handler of a time limit."""


@pytest.fixture
def alarm():
    """Arms SIGALRM so that its handler raises `Timeout`."""

    def ring(*_):
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.raise_signal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, before)


def once(function, event):
    """`function`, in the first call of which the event happens."""
    left = [event]

    def wrapped(*args, **kwargs):
        if left and threading.current_thread() is threading.main_thread():
            left.pop()()
        return function(*args, **kwargs)

    return wrapped


@both_ways
@pytest.mark.parametrize("place", ["choose", "forward", "copy"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_a_time_limit_arrives_wherever_it_rings(place, beside, alarm, monkeypatch):
    dense, paged = pair(blocks=60, token_budget=64)
    same = {name: value.repeat(3, 1) for name, value in zoo.prompts([10], seed=3).items()}  # A shared half-full block.
    other = zoo.prompts([12], seed=8)
    wanted = dense.generate(**other, **ENDLESS)
    paged.generate(**same, **LENGTHS)
    results: list = []
    company = threading.Thread(target=lambda: results.append(paged.generate(**other, **ENDLESS)))
    owner, name = {
        "choose": (categorical, "argmax"),
        "forward": (packed_cache.PackedForward, "attend"),
        "copy": (kv_pool.KVCacheGroup, "copy_blocks"),
    }[place]
    if beside:
        company.start()
    monkeypatch.setattr(owner, name, once(getattr(owner, name), alarm))
    # With a company that may be the driver all along, nothing rings in this thread.
    try:
        paged.generate(**same, **ENDLESS)
        arrived = False
    except Timeout:
        arrived = True
    assert arrived or beside
    if beside:
        company.join(60)
        assert len(results) == 1
        assert_rows_equal(dense, other, wanted, results[0])
    settled(paged)


@both_ways
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exit_in_the_drivers_thread_is_no_others(error, monkeypatch):
    """It comes while the driver chooses for both calls."""
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([9], seed=1), zoo.prompts([7], seed=2)]
    options = ENDLESS
    paged.generate(**prompts[0], **options)
    wanted = [dense.generate(**inputs, **options) for inputs in prompts]
    raised, real = [], sampler.Sampler.choose

    def choose(self, logits, noise):
        if len(logits) == 2 and not raised:
            raised.append(threading.get_ident())
            raise error
        return real(self, logits, noise)

    monkeypatch.setattr(sampler.Sampler, "choose", choose)
    idents: list = [None, None]
    got: list = [None, None]

    def call(number):
        idents[number] = threading.get_ident()
        try:
            got[number] = paged.generate(**prompts[number], **options)
        except BaseException as caught:
            got[number] = type(caught)

    in_threads(lambda: call(0), lambda: call(1))
    assert raised, "the calls never chose together"
    for ident, want, result in zip(idents, wanted, got):
        if ident == raised[0]:
            assert result is error
        else:
            assert torch.equal(result, want)
    settled(paged)


def interrupted_forward(model, run) -> None:
    """`run`, ended by a KeyboardInterrupt inside the third forward of a layer."""
    seen = []

    def strike(*_):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(strike)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        hook.remove()


@both_ways
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["packed", "beams", "no cache"])
def test_an_interrupt_inside_a_forward_leaves_no_call_behind(options):
    dense, paged = pair()
    inputs = zoo.prompts([20], seed=3)
    wanted = dense.generate(**inputs, **SHORT)
    paged.generate(**inputs, **SHORT)
    before = hf_paged.stats(paged).packed_calls
    interrupted_forward(paged, lambda: paged.generate(**inputs, **SHORT, **options))
    settled(paged)
    assert forward_context.running_forward() is None
    cache = DynamicCache(config=paged.config)
    assert not cache.layers[0].batch.is_deferring, "a new cache believes that a forward makes it"
    assert torch.equal(paged.generate(**inputs, **SHORT), wanted)
    assert hf_paged.stats(paged).packed_calls == before + 1
    new = zoo.build("llama", "paged")
    assert torch.equal(new.generate(**inputs, **SHORT), wanted)
    assert hf_paged.stats(new).packed_calls == 1 and not hf_paged.stats(new).fallbacks


def _forwards(model, inputs):
    for _ in range(3):
        model(**inputs)


def _generate(model, inputs):
    model.generate(**inputs, **SHORT)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_model_whose_call_was_interrupted_can_be_freed(call):
    model = zoo.build("llama", "paged")
    inputs = zoo.prompts([9])
    run = functools.partial(_forwards if call == "forward" else _generate, model, inputs)
    interrupted_forward(model, run)
    reference = weakref.ref(model)
    del model, run
    gc.collect()
    assert reference() is None


def test_a_failing_copy_costs_no_call_a_wrong_token(is_ahead, monkeypatch):
    """A device has no memory for the copy of a shared block, once or for good.

    A row that runs ahead gives its blocks up instead, and runs its tokens again.
    """
    dense, paged = pair(blocks=60, token_budget=64)
    same = {name: value.repeat(3, 1) for name, value in zoo.prompts([10], seed=3).items()}
    other = zoo.prompts([13], seed=8)
    options = ENDLESS
    wanted = [dense.generate(**inputs, **options) for inputs in (same, other)]
    real, failures = kv_pool.KVCacheGroup.copy_blocks, []
    for times in (1, 2):
        failures.clear()
        hf_paged.release(paged)

        def copy(self, copies, times=times):
            if copies and len(failures) < times:
                failures.append(copies)
                raise torch.OutOfMemoryError("the device is full")
            return real(self, copies)

        monkeypatch.setattr(kv_pool.KVCacheGroup, "copy_blocks", copy)
        got = in_threads(lambda: paged.generate(**same, **options), lambda: paged.generate(**other, **options))
        assert len(failures) == times
        assert torch.equal(got[1], wanted[1])
        if times == 1 or is_ahead:
            assert torch.equal(got[0], wanted[0]), "there was memory at the second try"
        else:
            assert isinstance(got[0], torch.OutOfMemoryError)
        settled(paged)


def test_a_streamer_that_calls_the_model_again_is_told_so():
    _, paged = pair()

    class Calls(RowStreamer):
        def put_rows(self, rows, tokens):
            paged.generate(**zoo.prompts([4]), **SHORT)

    with pytest.raises(UnsupportedError, match="hand the tokens to another thread"):
        paged.generate(**zoo.prompts([4, 6]), **SHORT, streamer=Calls())
    settled(paged)


def in_child(function, seconds: float = 60) -> int:
    """The exit code of `function` in a forked child; -1 if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = int(not function())
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_forked_while_another_thread_generates_works():
    torch.set_num_threads(1)  # A forked child has none of OpenMP's threads, with any attention.
    dense, paged = pair(blocks=60)
    inputs, long = zoo.prompts([20, 5], seed=3), {"max_new_tokens": 60, "min_new_tokens": 60, "pad_token_id": 0}
    wanted = dense.generate(**inputs, **SHORT)
    paged.generate(**inputs, **SHORT)
    stop, running = threading.Event(), threading.Event()

    def generate_on():
        while not stop.is_set():
            running.set()
            paged.generate(**zoo.prompts([30], seed=5), **long)

    def check() -> bool:
        blocks = hf_paged.stats(paged).total_blocks
        right = torch.equal(paged.generate(**inputs, **SHORT), wanted)
        stats = hf_paged.stats(paged)
        return right and stats.used_blocks == 0 and stats.total_blocks == blocks

    thread = threading.Thread(target=generate_on)
    thread.start()
    running.wait(30)
    try:
        codes = [in_child(check) for _ in range(3)]
    finally:
        stop.set()
        thread.join(60)
    assert codes == [0, 0, 0]
    settled(paged)
