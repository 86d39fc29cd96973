"""hf-paged serve: its arguments, the packages that it wants, and a process that SIGTERM ends."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

import hf_paged
from hf_paged.cli import main, serve
from hf_paged_integrations.serving import openai as package
from hf_paged_integrations.serving.openai import server
from support import served, zoo
from support.installed import CHECKOUT

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path) -> str:
    """A tiny model that can be loaded from its folder."""
    zoo.build("llama", "sdpa", vocab_size=320, max_position_embeddings=512).save_pretrained(tmp_path)
    served.tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def run(monkeypatch) -> list:
    """The arguments that servers are run with, instead of running them."""
    ran = []
    monkeypatch.setattr(server, "run_server", lambda *arguments: ran.append(arguments))
    return ran


def test_arguments_are_settings(folder, run, monkeypatch):
    monkeypatch.setenv(serve.API_KEY, "secret")
    given = ["--port", "9", "--max-queue", "0", "--drain-seconds", "1.5", "--model-name", "x", "--block-size", "32"]
    assert main.main(["serve", folder, *given, "--dtype", "bfloat16", "--tenant-header", "X-T"]) == 0
    ((model, tokenizer, settings, host, port),) = run
    assert (host, port) == ("127.0.0.1", 9) and len(tokenizer) == len(served.tokenizer())
    assert str(model.dtype) == "torch.bfloat16" and model.config._attn_implementation == "paged" and not model.training
    assert hf_paged.stats(model).block_size == 32
    assert (settings.max_queue, settings.drain_seconds, settings.model_name) == (0, 1.5, "x")
    assert (settings.api_key, settings.tenant_header) == ("secret", "X-T") and "secret" not in repr(settings)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["no/model"], "no config found for no/model: "),
        (["demo", "--max-running", "0"], "max_running must be at least 1; got 0"),
        (["demo", "--drain-seconds", "-1"], "drain_seconds must be at least 0; got -1.0"),
        (["demo", "--api-key", ""], "api_key is empty: give one, or leave it out"),
        (["demo", "--block-size", "7"], "block_size must be "),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(arguments, says, run, capsys):
    assert main.main(["serve", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"hf-paged: {says}") and not run


@pytest.mark.parametrize("module, name", package._PACKAGES.items())
def test_a_missing_package_is_had_by_the_extra(module, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in (package.__name__, server.__name__):
        monkeypatch.delitem(sys.modules, loaded)
    assert main.main(["serve", "demo"]) == 1
    assert capsys.readouterr().err == f'hf-paged: {name} is not installed: pip install "hf-paged[serve]"\n'
    extra = re.search(r"^serve = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f'"{name}"' in extra


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_the_process_too(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, CHECKOUT)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_paged.cli", "serve", folder, "--port", "0", "--model-name", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        lines = []
        while not (found := re.search(r"running on (http://127.0.0.1:\d+)", "".join(lines[-1:]))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0)
        options = {"model": "tiny", "prompt": "the sea", "logit_bias": {"2": -100}}
        stream = client.completions.create(**options, max_tokens=300, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None:
            try:
                client.completions.create(**options, max_tokens=1)
            except openai.APIStatusError as error:
                refused = error.status_code
        chunks = list(stream)
        assert refused == 503 and chunks[-1].choices[0].finish_reason == "length"
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
        assert "Traceback" not in rest
    finally:
        watch.cancel()
        process.kill()
        process.stderr.close()
