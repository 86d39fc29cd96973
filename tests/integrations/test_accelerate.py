"""Models that accelerate has placed: device maps, weights that are elsewhere between forwards, moved inputs."""

import contextlib
import copy

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
from support.packing import LENGTHS, compare
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


def on_two_devices(name, fake_device, where=lambda index, count: index >= count // 2):
    """A model whose layers are on one device or the other, as `where` says, as accelerate places it."""
    model, places = copy.deepcopy(zoo.pair(name)[1]), (fake_device.device, fake_device.second)
    count = len(model.model.layers)
    of_layer = {f"model.layers.{index}": places[where(index, count)] for index in range(count)}
    ends = {"model.embed_tokens": places[0], "model.rotary_emb": places[0]}
    ends |= dict.fromkeys(["model.norm", "lm_head"], of_layer[f"model.layers.{count - 1}"])
    config = hf_paged.PagedConfig(block_size=4, memory_budget="256KiB", token_budget=16, prefix_cache_share=1.0)
    hf_paged.configure(model, config)
    return dispatch_model(model, {**ends, **of_layer}, main_device=places[0], force_hooks=True)


def moved(inputs, device):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_layers_on_several_devices_run_packed(name, fake_device):
    dense, paged = zoo.pair(name)[0], on_two_devices(name, fake_device)
    inputs = zoo.prompts([13, 4, 30, 9, 21, 1])
    for _ in range(2):  # The second time from the prefix cache, on both devices.
        found = paged.generate(**moved(inputs, fake_device.device), **LENGTHS)
        assert torch.equal(found.cpu(), dense.generate(**inputs, **LENGTHS))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 2 and not stats.fallbacks and not stats.gathers and stats.prefix_hit_tokens
    (pool,) = registry.pools_under(paged)
    for spec, group in pool.groups.items():
        assert all(page.device == spec.device for storage in group.layers.values() for page in storage.pages)
    assert {spec.device for spec in pool.groups} == {fake_device.device, fake_device.second}


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_layers_on_several_devices_in_the_loop_of_transformers(options, fake_device):
    dense, paged = zoo.pair("llama")[0], on_two_devices("llama", fake_device)
    inputs = zoo.prompts([11] if "prompt_lookup_num_tokens" in options else [9, 4])
    found = paged.generate(**moved(inputs, fake_device.device), **LENGTHS, **options)
    assert torch.equal(found.cpu(), dense.generate(**inputs, **LENGTHS, **options))
    assert hf_paged.stats(paged).page_reads and not hf_paged.stats(paged).gathers


def test_devices_share_a_budget_by_their_layers(fake_device):
    """The first has one layer, the second has the others: each holds as many blocks."""
    paged = on_two_devices("gemma3_text", fake_device, lambda index, count: index > 0)
    paged.generate(**moved(zoo.prompts([9]), fake_device.device), **LENGTHS)
    (pool,) = registry.pools_under(paged)
    held = {}
    for spec, group in pool.groups.items():
        size = sum(page.nbytes for storage in group.layers.values() for page in storage.pages)
        held[spec.device] = held.get(spec.device, 0) + size
    count = len(paged.model.layers)
    assert 0.9 * 2**18 < sum(held.values()) <= 2**18
    assert held[fake_device.device] == pytest.approx(sum(held.values()) / count, rel=0.1)


def test_a_row_on_several_devices_needs_blocks_on_each(fake_device):
    paged = on_two_devices("llama", fake_device)
    hf_paged.configure(paged, hf_paged.PagedConfig(block_size=4, memory_budget="4KiB"))
    with pytest.raises(hf_paged.OutOfBlocksError):
        paged.generate(**moved(zoo.prompts([40]), fake_device.device), **LENGTHS)
    assert hf_paged.stats(paged).used_blocks == 0


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
