"""The self-check leaves no trace, is not misled by what its caller has set, and can run while hf_paged is imported."""

import gc
import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import hf_paged
from hf_paged import reasons
from hf_paged.models import registry
from hf_paged_integrations.transformers import self_check
from support.installed import CHECKOUT


def test_it_leaves_no_trace(monkeypatch, caplog):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(reasons, "_told", told := set())
    caplog.set_level(logging.INFO)
    gc.collect()
    tables = (registry._pools, registry._configs, registry._counts, registry._engines)
    before, sizes = (torch.get_rng_state(), torch.initial_seed(), dict(os.environ)), [len(table) for table in tables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = self_check.check_paged()
    assert counted.packed_calls == 1 and counted.page_reads == 32
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.initial_seed(), dict(os.environ))
    assert not told and not caplog.records
    gc.collect()
    assert [len(table) for table in tables] == sizes
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_paged-item")]


def test_a_setting_of_tokenizers_stays(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    self_check.check_paged()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


CALLERS = {
    "a model under construction": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("caller", CALLERS)
def test_what_the_caller_has_set_does_not_mislead_it(caller):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CALLERS[caller]():
            assert self_check.check_paged().packed_calls == 1
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_hooks_it_says_what_is_missing():
    hf_paged.disable()
    with pytest.raises(hf_paged.PagedError, match=r"is not registered with transformers: call hf_paged.enable\(\)"):
        self_check.check_paged()


PACKAGE = """
__path__ = [{folder!r}]
exec(compile(open({folder!r} + "/__init__.py").read(), "hf_paged", "exec"))
from hf_paged_integrations.transformers.self_check import check_paged
print(check_paged().packed_calls, "packed while hf_paged is imported")
"""
PROGRAM = """
import torch, transformers
import hf_paged_autoload
hf_paged_autoload.install()
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained({folder!r})
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="paged", dtype="bfloat16")
print(model.config._attn_implementation, model.dtype, model.device)
"""


def test_it_may_run_inside_the_import_that_a_model_causes(tmp_path):
    """As the hooks may call it: threads of the pipeline run while the import's lock is held, and a model is loading."""
    package = tmp_path / "first" / "hf_paged"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.format(folder=os.path.dirname(hf_paged.__file__)))
    path = os.pathsep.join(map(str, (package.parent, *CHECKOUT)))
    program = PROGRAM.format(folder=str(tmp_path / "model"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    expected = ["1 packed while hf_paged is imported", "paged torch.bfloat16 cpu"]
    assert done.stdout.splitlines() == expected, done.stderr
