"""Models that accelerate has placed: device maps, weights that are elsewhere between forwards, moved inputs."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.models import registry
from support import zoo
from support.packing import compare
from support.parity import PageReads, assert_generates_equal

CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ON_CPU = dict.fromkeys(PARTS, "cpu")
HALF_ON_DISK = {**ON_CPU, "model.layers.1": "disk", "lm_head": "disk"}


def load(folder, **placement):
    zoo.pair("llama")[0].save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="paged", **placement)


def offload(folder, function, *arguments, **options):
    result = function(zoo.build("llama", "paged"), *arguments, **options)
    return result[0] if isinstance(result, tuple) else result


PLACED = {
    "device_map, one entry": lambda folder: load(folder, device_map={"": "cpu"}),
    "device_map, auto": lambda folder: load(folder, device_map="auto"),
    "device_map, some on disk": lambda folder: load(folder, device_map=HALF_ON_DISK, offload_folder=folder),
    "dispatch_model": lambda folder: offload(folder, dispatch_model, ON_CPU, force_hooks=True),
    "dispatch_model, some on disk": lambda folder: offload(
        folder, dispatch_model, HALF_ON_DISK, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "cpu_offload": lambda folder: offload(folder, cpu_offload, execution_device=CPU),
    "disk_offload": lambda folder: offload(folder, disk_offload, folder, execution_device=CPU),
    "cpu_offload_with_hook": lambda folder: offload(folder, cpu_offload_with_hook, CPU),
}


@pytest.mark.parametrize("placement", PLACED)
def test_the_same_tokens(placement, tmp_path):
    model = PLACED[placement](tmp_path)
    elsewhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert bool(elsewhere) == ("disk" in placement or placement == "cpu_offload")
    models, inputs = (zoo.pair("llama")[0], model), zoo.prompts([9, 4, 12])
    compare(models, inputs)
    compare(models, inputs, do_sample=True)
    with PageReads(model):
        compare(models, inputs)
    assert_generates_equal(models, inputs, num_beams=3)
    assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == elsewhere


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_every_layer_offloaded(name):
    model = cpu_offload(zoo.build(name, "paged"), execution_device=CPU)
    assert model.device.type == "meta"
    compare((zoo.pair(name)[0], model), zoo.prompts([9, 4, 12]))
    assert {key.device for key in registry.pools_under(model)[0].groups} == {CPU}
    hf_paged.release(model)
    assert hf_paged.stats(model).total_blocks == 0


class MovesEverything(ModelHook):
    """As accelerate's hook of a layer on another device; torch takes this one for another one, too, and copies."""

    def pre_forward(self, module, *args, **kwargs):
        device = torch.device("cpu:0")
        return send_to_device(args, device), send_to_device(kwargs, device)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_hooks_that_move_activations(name, options):
    """Masks stay lazy on their way to a layer's device: the pages are read, nothing is gathered."""
    model = zoo.build(name, "paged")
    for layer in model.model.layers:
        add_hook_to_module(layer, MovesEverything())
    rows = [11] if "prompt_lookup_num_tokens" in options else [9, 4]
    assert_generates_equal((zoo.pair(name)[0], model), zoo.prompts(rows), **options)


def test_a_moved_mask_is_the_same_mask():
    masks = []
    paged = zoo.build("llama", "paged")
    layer = paged.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    paged.generate(**zoo.prompts([5, 3]), max_new_tokens=3, num_beams=2)
    mask = masks[-1]
    moved, other = mask.to("cpu:0"), mask.to("meta", non_blocking=True)
    assert mask.to("cpu") is mask and mask.to(mask.dtype) is mask
    assert type(moved) is type(other) is type(mask) and other.device.type == "meta"
    assert (other.pattern, other.obstacle, other.offset) == (mask.pattern, mask.obstacle, mask.offset)
    assert torch.equal(moved.dense("a test"), mask.dense("a test")) and other.dense("a test").is_meta
    assert mask.to(torch.float16).dtype == torch.float16 and type(mask.to(torch.float16)) is torch.Tensor


def test_a_pool_for_each_device():
    pool = KVPool(hf_paged.PagedConfig(memory_budget="1MiB"))
    for device in (CPU, torch.device("meta")):
        states = torch.zeros(1, 2, 3, 16, device=device)
        group = pool.group(KVCacheSpec(None, states.dtype, states.device), states, states, num_layers=2)
        assert all(pages.device == device for pages in group.layer(0, states, states).pages)
    assert len(pool.groups) == 2


def test_layers_on_several_devices_run_the_loop_of_transformers():
    """No second device here: the pool is told of a layer on one when its first layer is stored."""
    dense, paged = zoo.pair("llama")[0], zoo.build("llama", "paged")

    def elsewhere(model, args, output):
        states = torch.zeros(1, 2, 3, 16, device="meta")
        pool = registry.pool_of(model)
        pool.group(KVCacheSpec(None, states.dtype, states.device), states, states, num_layers=2)

    handle = paged.model.register_forward_hook(elsewhere)
    assert_generates_equal((dense, paged), zoo.prompts([9, 4]))
    handle.remove()
    stats = hf_paged.stats(paged)
    assert stats.fallbacks == {"the model's layers are on several devices": 1} and stats.packed_calls == 0


@pytest.mark.parametrize("place", ["around generate", "inside forward"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_mixed_precision(place, options):
    """Autocast rounds the values and, after the rotation, not the keys: such states go into no pages."""
    models = [zoo.build("llama", name) for name in ("sdpa", "paged")]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    if place == "inside forward":  # As Accelerator.prepare does it.
        for model in models:
            model.forward = autocast(model.forward)
    arguments = {**zoo.prompts([9, 4]), "max_new_tokens": 12, "pad_token_id": 0, **options}
    with autocast if place == "around generate" else contextlib.nullcontext():
        dense, paged = (model.generate(**arguments) for model in models)
    assert torch.equal(dense, paged)
    if "num_beams" not in options:
        said = {
            "around generate": "autocast is on",
            "inside forward": "keys and values differ in more than their head size",
        }
        assert hf_paged.stats(models[1]).fallbacks == {said[place]: 1}
