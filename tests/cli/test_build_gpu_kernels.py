"""``hf-paged build`` for GPUs: the kernels of a model's layers, and that its steps ask for no others."""

import re

import pytest
import torch

import hf_paged
from hf_paged.cli import main
from hf_paged.cli.gpu_kernels import layer_of_heads, model_layers
from hf_paged_evals.triton.compile import specialisations
from hf_paged_evals.triton.targets import TARGETS
from hf_paged_kernels import backends, torch_sdpa
from hf_paged_kernels.triton.ahead import AttentionLayer, layer_calls
from hf_paged_kernels.triton.kernel_calls import attention_calls, copy_call, latent_calls, write_call
from support import zoo

SM90 = TARGETS["sm90"]


def kernel_calls(op, arguments):
    """The kernel calls of an op's call, if it ran on an H100."""
    if op == "write_kv":
        return [write_call(*arguments)]
    if op == "copy_blocks":
        return [copy_call(*arguments)]
    query, *rest = arguments
    if op == "latent_attention":
        return latent_calls(SM90.device, torch.empty_like(query), query, *rest)
    writes = []
    if op == "write_and_attend":
        writes, rest = [write_call(*rest[:5])], [*rest[2:4], *rest[5:]]
    return writes + attention_calls(SM90.device, query.new_empty(*query.shape[:2], rest[1].shape[3]), query, *rest)


@pytest.fixture
def asked():
    """The kernels that the ops of this process would ask an H100 for."""
    keys, ops = set(), []

    def find(op, arguments):
        keys.update(specialisations(kernel_calls(op, arguments), SM90))
        ops.append(op)
        return getattr(torch_sdpa, op)

    backends.register(backends.Backend("recorder", "cpu", find, priority=20))
    try:
        yield keys
    finally:
        backends.unregister("recorder")
    assert "copy_blocks" in ops and {"write_and_attend", "latent_attention"} & set(ops)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_model_asks_for_no_kernel_that_is_not_compiled_ahead(name, asked):
    """Prompts in chunks, mixed steps, decode steps, beams, and blocks that are copied."""
    # Sizes of real models are multiples of 16, by which Triton tells kernels apart.
    sizes = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "head_dim": 16} if name == "deepseek_v3" else {}
    model = zoo.build(name, "paged", torch.bfloat16, **sizes)
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=16, token_budget=24))
    inputs = zoo.prompts([40, 3, 21])
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, pad_token_id=0, num_beams=2)
    layers = model_layers(model.config, torch.bfloat16, 16)
    ahead = set().union(*(specialisations(layer_calls(SM90.device, layer), SM90) for layer in layers))
    assert len(asked) >= 5 and asked <= ahead


def test_layers_are_those_of_the_config():
    (llama,) = model_layers(zoo.build("llama", None).config, torch.float16, 32)
    assert llama == AttentionLayer(4, 2, 16, 16, 32, torch.float16)
    latents, expanded = model_layers(zoo.build("deepseek_v3", None).config, torch.bfloat16, 32)
    assert latents == AttentionLayer(4, 1, 16, 8, 32, torch.bfloat16, expanded_dim=16)
    assert expanded == AttentionLayer(4, 4, 16, 16, 1, torch.bfloat16)
    full, window = model_layers(zoo.build("gpt_oss", None).config, torch.bfloat16, 16)
    assert full.window is None and window.window and full.sinks == window.sinks == torch.bfloat16
    full, window = model_layers(zoo.build("gpt_oss", None).config, torch.bfloat16, 16, torch.int8)
    assert full.codes == torch.int8 and window.codes is None
    assert all(layer.has_softcap for layer in model_layers(zoo.build("gemma2", None).config, torch.float32, 16))


def test_heads_are_named_on_the_command_line():
    assert layer_of_heads("32,8,128", torch.float16, 16) == AttentionLayer(32, 8, 128, 128, 16, torch.float16)
    assert layer_of_heads("16,16,192,128", torch.float16, 16).value_dim == 128
    assert layer_of_heads("32,8,128", torch.float16, 16, torch.int8).codes == torch.int8
    for wrong in ("32,8", "32,5,128", "32,0,128", "a,b,c", "1,1,1,1,1"):
        with pytest.raises(ValueError, match=f"such as 32,8,128, .* got {wrong}"):
            layer_of_heads(wrong, torch.float16, 16)


@pytest.fixture
def built(monkeypatch):
    """The layers that the command would compile, instead of compiling them."""
    jobs = []

    def compile_layers(layers, device, num_processes):
        jobs.append((layers, device, num_processes))
        return 11, []

    monkeypatch.setattr("hf_paged_kernels.triton.ahead.compile_layers", compile_layers)
    monkeypatch.setattr(main, "find_compiler", lambda: None)
    monkeypatch.setattr(main, "build_kernels", lambda compiler: "the library")
    return jobs


def test_the_command(built, tmp_path, monkeypatch, capsys):
    zoo.build("llama", None).config.save_pretrained(tmp_path)
    assert main.main(["build", "--model", str(tmp_path), "--dtype", "float16", "--target", "sm90", "--jobs", "2"]) == 0
    ((layers, device, jobs),) = built
    assert layers == [AttentionLayer(4, 2, 16, 16, 16, torch.float16)] and device.arch == "sm90" and jobs == 2
    assert main.main(["build", "--heads", "4,2,16", "--kv-dtype", "fp8_e4m3", "--target", "sm90"]) == 0
    assert built.pop()[0] == [AttentionLayer(4, 2, 16, 16, 16, torch.bfloat16, codes=torch.float8_e4m3fn)]
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "compiled: the library" and re.match(r"compiled: 11 Triton kernels for sm90 in /", second)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "4,2,16"], "no GPU here to compile for: name one with --target"),
        (["--heads", "4,2,16", "--target", "sm75"], "no kernels for sm75"),
        (["--target", "sm90"], "--target is for the GPU kernels of a model: name it with --model"),
        (["--block-size", "16"], "--block-size is for the GPU kernels"),
        (["--kv-dtype", "int8"], "--kv-dtype is for the GPU kernels"),
        (["--heads", "4,2,16", "--target", "sm90", "--jobs", "0"], "--jobs must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(built, arguments, message, capsys):
    assert main.main(["build", *arguments]) == 1
    assert message in capsys.readouterr().err and not built


def test_kernels_that_do_not_compile_are_named(built, monkeypatch, capsys):
    failed = lambda *arguments: (3, ["decode_kernel of a layer: out of registers"])  # noqa: E731
    monkeypatch.setattr("hf_paged_kernels.triton.ahead.compile_layers", failed)
    assert main.main(["build", "--heads", "4,2,16", "--target", "sm90"]) == 1
    assert "1 Triton kernels do not compile for sm90; the first: decode_kernel of a layer" in capsys.readouterr().err
