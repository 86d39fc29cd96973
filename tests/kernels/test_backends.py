"""The registry of attention backends: another one is asked in its turn, for what it serves, and can be taken away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_paged
from hf_paged.cli.doctor import report
from hf_paged_kernels import backends, ops, reference
from hf_paged_kernels.backends import Backend, BackendState
from support import zoo
from support.op_matrix import op_arguments

ROOT = Path(__file__).parent.parent.parent
FIRST, LAST = 20, -1  # Priorities before and after all built-in backends.


@pytest.fixture(autouse=True)
def same_backends():
    """Every test leaves the registry, and torch's dispatcher, as they were."""
    before = set(backends.registered())
    yield
    assert set(backends.registered()) == before and not backends._detours


@pytest.fixture
def register():
    """Register a backend on the CPU that runs the reference and writes down its calls, for one test."""
    added = []

    def add(name="toy", priority=FIRST, serves=lambda op: True, **fields):
        seen = []

        def find(op, arguments):
            seen.append(op)
            return getattr(reference, op) if serves(op) else None

        backends.register(Backend(name, "cpu", find, priority, **fields))
        added.append(name)
        return seen

    yield add
    for name in added:
        if any(backend.name == name for backend in backends.registered()):
            backends.unregister(name)


def results(module) -> dict[str, list[torch.Tensor]]:
    """The result of every op, and its caches afterwards."""
    found = {}
    for op, arguments in op_arguments().items():
        out = getattr(module, op)(*arguments)
        caches = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim() == 4]
        found[op] = caches if out is None else [out, *caches]
    return found


def are_equal(one, other) -> bool:
    return all(torch.equal(a, b) for op in backends.OPS for a, b in zip(one[op], other[op], strict=True))


def test_the_built_in_backends():
    *first, last = [backend.name for backend in backends.registered()]
    assert set(first) == {"cpp", "triton"} and last == "torch"
    for backend in backends.registered():
        if backend.name != "triton":  # It warns where there is no GPU: see test_launch_plan.py.
            assert isinstance(backend.state(), BackendState) and backend.state().available


def test_a_backend_of_higher_priority_computes_instead(register):
    """Though the C++ kernels are in torch's dispatcher already."""
    native = results(ops)
    seen = register()
    assert are_equal(results(ops), results(reference)) and seen == list(backends.OPS)
    backends.unregister("toy")
    assert are_equal(results(ops), native) and seen == list(backends.OPS)


def test_a_backend_of_lower_priority_is_not_asked(register):
    seen = register(priority=LAST)
    results(ops)
    assert not seen


def test_calls_that_a_backend_leaves_go_to_the_next(register):
    native = results(ops)
    seen = register(serves=lambda op: op == "copy_blocks")
    assert are_equal(results(ops), native) and seen == list(backends.OPS)


def test_a_backend_is_asked_for_its_ops_alone(register):
    seen = register(ops=frozenset({"paged_attention"}))
    found, expected = results(ops), results(reference)
    assert torch.equal(found["paged_attention"][0], expected["paged_attention"][0]) and seen == ["paged_attention"]


def test_priority_decides_between_two(register):
    second, first = register("second", FIRST), register("first", FIRST + 1)
    results(ops)
    assert first == list(backends.OPS) and not second
    assert [backend.name for backend in backends.registered()][:2] == ["first", "second"]


def test_a_built_in_backend_can_be_taken_away_and_put_back():
    native = results(ops)
    cpp = backends.unregister("cpp")
    try:
        in_torch = results(torch.ops.hf_paged)
        assert not torch.equal(in_torch["paged_attention"][0], native["paged_attention"][0])
        torch.testing.assert_close(in_torch, native)
    finally:
        backends.register(cpp)
    assert are_equal(results(ops), native)


def test_a_call_that_no_backend_serves():
    removed = [backends.unregister(name) for name in ("cpp", "torch")]
    try:
        with pytest.raises(NotImplementedError, match="no backend serves this call of write_kv on cpu: register"):
            ops.write_kv(*op_arguments()["write_kv"])
    finally:
        for backend in removed:
            backends.register(backend)


def test_wrong_registrations_are_refused(register):
    register()
    with pytest.raises(ValueError, match="a backend named 'toy' is registered already: unregister it first"):
        register()
    with pytest.raises(ValueError, match="serves ops of write_kv, .*; got read_kv"):
        register("other", ops=frozenset({"read_kv"}))
    with pytest.raises(ValueError, match="no backend is named 'none': registered are toy, "):
        backends.unregister("none")


def test_compiled_code_calls_the_backend_of_the_moment(register):
    query, *rest = op_arguments()["paged_attention"]
    compiled = torch.compile(lambda query: ops.paged_attention(query, *rest), fullgraph=True, backend="aot_eager")
    native = compiled(query)
    seen = register()
    assert torch.equal(compiled(query), reference.paged_attention(query, *rest)) and seen == ["paged_attention"]
    backends.unregister("toy")
    assert torch.equal(compiled(query), native) and seen == ["paged_attention"]


def test_generate_runs_on_a_backend(register):
    dense, paged = zoo.pair("llama")
    inputs = zoo.prompts([9, 4])
    expected = dense.generate(**inputs, max_new_tokens=6)
    seen = register()
    reads = hf_paged.stats(paged).page_reads
    assert torch.equal(paged.generate(**inputs, max_new_tokens=6), expected)
    assert seen.count("write_and_attend") >= hf_paged.stats(paged).page_reads - reads > 0
    count = len(seen)
    backends.unregister("toy")
    assert torch.equal(paged.generate(**inputs, max_new_tokens=6), expected) and len(seen) == count


def test_the_doctor_prints_the_state_of_a_backend(register):
    assert len(report.kernel_state(has_gpu=False)) == 2
    register("mine", state=lambda: BackendState(False, "HF_PAGED_MINE=0 turns it off"))
    register("second", LAST)
    *_, first, last = report.kernel_state(has_gpu=False)
    assert first == ("mine", "a backend for cpu, cannot be used: HF_PAGED_MINE=0 turns it off")
    assert last == ("second", "a backend for cpu, can be used")


GENERATE = """
import torch
import hf_paged
from hf_paged.cli.doctor import report
from hf_paged_kernels import backends, ops, reference
from hf_paged_kernels.cpu import loader
from support import zoo

seen = []

def find(op, arguments):
    seen.append(op)
    return getattr(reference, op) if op == "write_and_attend" else None

dense, paged = zoo.pair("llama")
inputs = zoo.prompts([9, 4])
expected = dense.generate(**inputs, max_new_tokens=4)
assert loader._library is None, "the C++ kernels are loaded already"
backends.register(backends.Backend("toy", "cpu", find, priority=20))
caches = [torch.ones(2, 1, 4, 8) for _ in "kv"]
ops.copy_blocks(*caches, torch.tensor([0]), torch.tensor([1]))  # Left to the next backend, which is loaded now.
assert torch.equal(paged.generate(**inputs, max_new_tokens=4), expected)
print(loader._library is not None, seen[0], seen.count("write_and_attend") >= hf_paged.stats(paged).page_reads > 0)
count = len(seen)
backends.unregister("toy")
assert torch.equal(paged.generate(**inputs, max_new_tokens=4), expected)
print(len(seen) == count)
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_a_backend_that_is_registered_before_the_kernels_are_loaded(native):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "tests")])
    environment = {**os.environ, "HF_PAGED_NATIVE": native, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", GENERATE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{native == '1'} copy_blocks True\nTrue\n"
    assert "Overriding" not in done.stderr
