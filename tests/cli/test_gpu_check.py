"""The doctor's check of the GPU kernels, run here on the CPU's: it passes right ones and names what is wrong."""

import pytest
import torch

from hf_paged.cli.doctor import gpu_check, report
from hf_paged.errors import PagedError
from hf_paged_kernels import ops
from hf_paged_kernels.triton import dispatch

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu_check, "_ROWS", 2)
    monkeypatch.setattr(gpu_check, "_CONTEXT", 64)
    monkeypatch.setattr(gpu_check, "_SECONDS", 0.01)


def test_right_kernels_pass(small):
    state = torch.get_rng_state()
    found = gpu_check.check_gpu(CPU)
    assert found.cases == 3 * len(gpu_check._DIMS) * 4 and found.attention > 0 and found.copy > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [lambda out: out * 1.05, lambda out: out * float("nan"), lambda out: out.flip(0)])
def test_wrong_kernels_are_named(small, monkeypatch, change):
    attend = ops.write_and_attend
    monkeypatch.setattr(ops, "write_and_attend", lambda *arguments: change(attend(*arguments)))
    with pytest.raises(PagedError, match="wrong on cpu in torch.float32, head size 64, no options"):
        gpu_check.check_gpu(CPU)


@pytest.fixture
def gpu_machine(monkeypatch):
    """A machine with a GPU on which Triton runs, as the doctor sees it."""
    monkeypatch.setattr(report, "gpus", lambda: ["Some GPU"])
    monkeypatch.setattr(dispatch, "_launch", dispatch)


def test_the_doctor_prints_the_verdict(gpu_machine, monkeypatch, capsys):
    monkeypatch.setattr(report, "check_gpu", lambda device: gpu_check.GpuCheck(48, 1.5e12, 2.0e12))
    assert report.run_doctor()
    out = capsys.readouterr().out
    assert "48 calls agree with the reference" in out and "1,500 GB/s" in out and "attention reaches 75% of it" in out
    assert "Triton kernels read the pages in place" in out


def test_the_doctor_says_when_the_gpu_fails(gpu_machine, monkeypatch, capsys):
    def fail(device):
        raise PagedError("the attention kernels are wrong")

    monkeypatch.setattr(report, "check_gpu", fail)
    assert not report.run_doctor()
    out = capsys.readouterr().out
    assert "failed: the attention kernels are wrong" in out and "set HF_PAGED_TRITON=0" in out
