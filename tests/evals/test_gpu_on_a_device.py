"""Stages of ``hf-paged eval gpu`` with tensors on a device that is not the host: the fake one, as strict as a GPU."""

import time

import pytest

from hf_paged_evals.gpu import recorder
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.plan import STAGES
from hf_paged_evals.gpu.stages import equality

ON_A_DEVICE = ("op_accuracy", "decode", "decode_peers", "model_step", "equality", "prefill", "generate", "many_calls")


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_a_stage_keeps_its_tensors_on_the_device(name, fake_device, tmp_path, monkeypatch):
    # Its experts are counted by an integer histogram, which the CPU's kernels behind the fake device lack.
    monkeypatch.delitem(equality.MODELS, "gpt_oss")
    now = time.monotonic()
    context = Context(
        fake_device.device, True, tmp_path, recorder.Recorder(tmp_path / recorder.FILE, name, now), now + 99
    )
    (stage,) = [stage for stage in STAGES if stage.name == name]
    with fake_device.watch() as traffic:
        stage.load()(context)
    lines = recorder.read_lines(tmp_path)
    assert traffic.launches > 20
    assert not [line for line in lines if line["kind"] in ("wrong_op", "error") or line.get("right") is False]
    assert all(line["equal_rows"] == line["rows"] for line in lines if line["kind"] == "mode"), lines
