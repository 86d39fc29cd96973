"""Registration is explicit, idempotent and reversible, and touches no other implementation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import hf_paged
from hf_paged.cache.layers import PagedLayer
from support import zoo

ROOT = Path(__file__).parent.parent.parent


def touched():
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        DynamicCache.__dict__["__init__"],
        PreTrainedModel.__dict__["get_correct_attn_implementation"],
    )


def test_enable_and_disable_are_idempotent_and_restore_transformers():
    enabled = touched()
    hf_paged.enable()
    assert touched() == enabled
    hf_paged.disable()
    hf_paged.disable()
    restored = touched()
    assert "paged" not in restored[0] and "paged" not in restored[1]
    assert all(not hasattr(method, "_hf_paged_original") for method in restored[2:])
    assert not hf_paged.is_enabled()
    hf_paged.enable()
    hf_paged.disable()
    assert touched() == restored
    hf_paged.enable()
    assert hf_paged.is_enabled()


def test_disabled_transformers_refuses_the_name():
    hf_paged.disable()
    with pytest.raises(ValueError, match="paged"):
        zoo.build("llama", "paged")


@pytest.mark.parametrize(
    "constructor",
    [
        lambda self, config=None: None,
        lambda self, device, ddp_cache_data=None, config=None, offloading=False, offload_only_non_sliding=True: None,
    ],
    ids=["parameters are missing", "one more is needed"],
)
def test_a_patched_signature_is_refused(monkeypatch, constructor):
    hf_paged.disable()
    monkeypatch.setattr(DynamicCache, "__init__", constructor)
    with pytest.raises(hf_paged.PagedError, match="DynamicCache.__init__ .* other arguments"):
        hf_paged.enable()
    assert not hf_paged.is_enabled()


def test_a_parameter_that_may_be_left_out_is_no_obstacle(monkeypatch):
    """As newer versions add them: the hooks hand it on."""
    hf_paged.disable()
    init = DynamicCache.__init__

    def constructor(
        self, ddp_cache_data=None, config=None, offloading=False, offload_only_non_sliding=True, device=None
    ):
        init(self, ddp_cache_data, config, offloading, offload_only_non_sliding)
        self.made_for = device

    monkeypatch.setattr(DynamicCache, "__init__", constructor)
    hf_paged.enable()
    model = zoo.build("llama", "paged")
    cache = DynamicCache(config=model.config, device="here")
    assert cache.made_for == "here" and isinstance(cache.layers[0], PagedLayer)
    hf_paged.disable()  # Before `monkeypatch` puts the constructor back.


def test_models_that_are_not_paged_are_untouched():
    model = zoo.build("llama", "sdpa")
    assert all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_switching_back_and_forth():
    dense, model = zoo.pair("llama")[0], zoo.build("llama", "sdpa")
    inputs = zoo.prompts([9, 4])
    expected = dense.generate(**inputs, max_new_tokens=12)
    for implementation in ("paged", "sdpa", "paged", "eager"):
        model.set_attn_implementation(implementation)
        hf_paged.release(model)
        assert torch.equal(model.generate(**inputs, max_new_tokens=12), expected)
        assert (hf_paged.stats(model).page_reads > 0) == (implementation == "paged")
        assert any(module._forward_hooks for module in model.modules()) == (implementation == "paged")


def test_a_config_set_behind_our_back_is_still_right():
    """Nobody told us of the model: its cache stays dense."""
    dense, model = zoo.pair("llama")[0], zoo.build("llama", "sdpa")
    model.config._attn_implementation = "paged"
    inputs = zoo.prompts([9, 4])
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), dense.generate(**inputs, max_new_tokens=12))


def test_the_name_is_not_saved(tmp_path):
    model = zoo.build("llama", "paged")
    model.save_pretrained(tmp_path)
    assert '"paged"' not in (tmp_path / "config.json").read_text()


def test_loading_from_disk(tmp_path):
    dense = zoo.pair("llama")[0]
    dense.save_pretrained(tmp_path)
    model = type(dense).from_pretrained(tmp_path, attn_implementation="paged")
    inputs = zoo.prompts([9, 4])
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), dense.generate(**inputs, max_new_tokens=12))
    assert hf_paged.stats(model).page_reads > 0


def run(code: str, folder: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_checkout_does_not_shadow_the_package_kernels(tmp_path):
    """From the checkout's root `import kernels` is Hugging Face's, for transformers too."""
    code = (
        "import kernels, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "print(kernels.__file__, hasattr(kernels, 'get_kernel'), is_kernels_available())\n"
    )
    theirs = run(code)
    assert "site-packages" in theirs and " True " in theirs
    assert theirs == run(code, tmp_path)
    ours = run("import hf_paged, hf_paged_kernels.ops\nprint(hf_paged_kernels.ops.__file__)")
    assert Path(ours.strip()).resolve() == ROOT / "kernels" / "hf_paged_kernels" / "ops.py"


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "kernels").rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not any("hf_paged" in line.replace("hf_paged_kernels", "") for line in lines), path


def test_the_allocator_imports_no_torch():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('hf_paged'); package.__path__ = ['hf_paged']\n"
        "sys.modules['hf_paged'] = package\n"
        "import hf_paged.memory.block_pool, hf_paged.memory.block_table\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"
