"""A pool on a device that has memory of its own: it takes its budget once, and keeps to it.

The CPU takes its memory as such a device would, "meta" stands in for its shapes, or `support.fake_device` for itself.
"""

import gc
import types
import weakref

import pytest
import torch

import hf_paged
from hf_paged import PagedConfig
from hf_paged.compat import devices
from hf_paged.memory import kv_pool, kv_storage, sizing
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import registry
from support import zoo
from support.packing import compare

META = torch.device("meta")
MIB, GIB = 2**20, 2**30


@pytest.fixture
def at_once(monkeypatch):
    """Let pools on the CPU take their budget at once."""
    for module in (kv_pool, kv_storage):
        monkeypatch.setattr(module, "is_taken_at_once", lambda device: True)


@pytest.fixture
def memory(monkeypatch):
    """The memory of the device, as the test sets it: (free, total)."""
    said = types.SimpleNamespace(free=60 * GIB, total=80 * GIB)
    monkeypatch.setattr(sizing, "own_memory", lambda device: (said.free, said.total))
    return said


def states(num_kv_heads=2, dim=16):
    return torch.empty(1, num_kv_heads, 1, dim, device=META)


def group_of(pool, window=None, num_layers=4):
    spec = KVCacheSpec(window, torch.float32, META)
    return pool.group(spec, states(), states(), num_layers)


def refuse_pages(monkeypatch, at, times=1):
    """Let the device refuse the n-th allocation of a tensor of pages, and those after it, so many in all."""
    allocate, count = KVStorage._allocate, [0]

    def refusing(self, part):
        count[0] += 1
        if at <= count[0] < at + times:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return allocate(self, part)

    monkeypatch.setattr(KVStorage, "_allocate", refusing)


def test_every_layer_has_the_blocks_of_the_budget_from_the_beginning(memory):
    pool = KVPool(PagedConfig(memory_budget="1GiB"))
    group = group_of(pool)
    for index in range(4):
        group.layer(index, states(), states())
    held = sum(page.nbytes for storage in group.layers.values() for page in storage.pages)
    assert GIB - 4 * group.layers[0].block_bytes < held <= GIB
    assert group.capacity == group.budget_blocks == group.layers[0].num_blocks


def test_the_default_budget_is_a_share_of_what_was_free_before_the_first_layer(memory):
    """Whatever the layers before have taken by the time that a second group is made."""
    pool = KVPool(PagedConfig())
    first = group_of(pool)
    memory.free = GIB
    assert first.budget_blocks == group_of(pool, window=8).budget_blocks
    assert first.budget_blocks == int(60 * GIB * 0.75) // (4 * first.layer(0, states(), states()).block_bytes)


def test_what_torch_holds_and_does_not_use_is_free(monkeypatch):
    module = types.SimpleNamespace(
        mem_get_info=lambda device: (10 * GIB, 80 * GIB),
        memory_reserved=lambda device: 50 * GIB,
        memory_allocated=lambda device: 20 * GIB,
    )
    monkeypatch.setattr(devices, "module_of", lambda device: module)
    assert sizing.available_memory(META) == 40 * GIB and sizing.physical_memory(META) == 80 * GIB
    assert sizing.budget_bytes(PagedConfig(), META) == 30 * GIB
    module.get_per_process_memory_fraction = lambda device: 0.5
    assert sizing.available_memory(META) == 20 * GIB and sizing.physical_memory(META) == 40 * GIB


@pytest.mark.parametrize("type_of_device", ["cpu", "meta"])
def test_a_device_without_memory_of_its_own_has_the_hosts(type_of_device):
    device = torch.device(type_of_device)
    assert devices.own_memory(device) is None
    assert sizing.default_share(device) == 0.25


def test_a_budget_that_the_device_cannot_give_is_refused_before_anything_is_allocated(memory):
    pool = KVPool(PagedConfig(memory_budget="70GiB"))
    said = r"memory_budget is 75,161,927,680 bytes.* 64,424,509,440 are free on meta. Set a smaller memory_budget"
    with pytest.raises(hf_paged.OutOfBlocksError, match=said) as failure:
        group_of(pool)
    assert failure.value.total == 0 and failure.value.free < failure.value.needed and not pool.groups
    memory.free = 75 * GIB
    assert group_of(pool).budget_blocks == failure.value.needed


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_memory_that_is_refused_is_an_error_of_ours_and_can_be_asked_for_again(memory, monkeypatch, at):
    """The second of a layer's tensors as well as the first: no layer is left with keys and without values."""
    group = group_of(KVPool(PagedConfig(memory_budget="1GiB")))
    refuse_pages(monkeypatch, at)
    before = (at - 1) // 2
    for index in range(before):
        group.layer(index, states(), states())
    said = f"{before} layers of a KV cache group have their .* blocks on meta, the next one needs .* smaller memory_bud"
    with pytest.raises(hf_paged.OutOfBlocksError, match=said) as failure:
        group.layer(before, states(), states())
    assert isinstance(failure.value.__cause__, torch.OutOfMemoryError) and len(group.layers) == before
    group.layer(before, states(), states())
    assert {len(page) for storage in group.layers.values() for page in storage.pages} == {group.capacity}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["packed", "beams"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_model_whose_pool_is_refused_says_so_and_goes_on_when_there_is_memory(at_once, monkeypatch, options, at):
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    arguments = {**zoo.prompts([9, 4]), "max_new_tokens": 8, **options}
    with monkeypatch.context() as patch:
        refuse_pages(patch, at, times=1000)
        with pytest.raises(hf_paged.OutOfBlocksError, match="the pool cannot be allocated"):
            models[1].generate(**arguments)
    assert hf_paged.stats(models[1]).used_blocks == 0
    assert torch.equal(*(model.generate(**arguments) for model in models))


def test_addresses_never_move(at_once):
    """Whatever runs: captured steps rely on it."""
    models = zoo.pair("gemma3_text")[0], zoo.build("gemma3_text", "paged")
    hf_paged.configure(models[1], PagedConfig(block_size=4, memory_budget="1MiB"))
    compare(models, zoo.prompts([3]))
    (pool,) = registry.pools_under(models[1])

    def addresses():
        storages = [storage for group in pool.groups.values() for storage in group.layers.values()]
        return [page.data_ptr() for storage in storages for page in storage.pages]

    before = addresses()
    compare(models, zoo.prompts([40, 30, 20, 10, 5]))
    for options in ({"num_beams": 4}, {"prompt_lookup_num_tokens": 3}):
        models[1].generate(**zoo.prompts([30]), max_new_tokens=20, **options)
    assert addresses() == before


def test_a_call_that_cannot_wait_keeps_to_the_budget(at_once):
    """On the CPU it would go on with a warning. Here there is no more, and what is free is the user's."""
    models = zoo.pair("llama")[0], zoo.build("llama", "paged")
    hf_paged.configure(models[1], PagedConfig(block_size=4, memory_budget=16 * 1024))
    with pytest.raises(hf_paged.OutOfBlocksError, match=r"needs 16 blocks, 8 of 8 are free: lower the batch or"):
        models[1].generate(**zoo.prompts([30, 20, 10]), max_new_tokens=12, num_beams=2)
    stats = hf_paged.stats(models[1])
    assert (stats.total_blocks, stats.used_blocks) == (8, 0)
    compare(models, zoo.prompts([3]))


def test_release_gives_the_memory_back(at_once):
    paged = zoo.build("llama", "paged")
    hf_paged.configure(paged, PagedConfig(memory_budget="1MiB"))
    paged.generate(**zoo.prompts([9]), max_new_tokens=2)
    (pool,) = registry.pools_under(paged)
    held = [weakref.ref(storage) for group in pool.groups.values() for storage in group.layers.values()]
    del pool
    hf_paged.release(paged)
    gc.collect()  # What fills new slots with NaN, in tests, makes a cycle.
    assert held and not any(reference() for reference in held), "memory that the user's own work cannot have"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["packed", "beams"])
def test_a_device_without_room_for_the_pool(fake_device, options):
    """Half of it fits: the first layer has its pages, the second has not."""
    dense, paged = zoo.pair("llama")[0], zoo.build("llama", "paged").to(fake_device.device)
    hf_paged.configure(paged, PagedConfig(block_size=4, memory_budget="1MiB"))
    inputs = zoo.prompts([9, 4])
    moved = {name: tensor.to(fake_device.device) for name, tensor in inputs.items()}
    with fake_device.memory_left(2**20 * 5 // 8):
        with pytest.raises(hf_paged.OutOfBlocksError, match="1 layers of a KV cache group .* on fakegpu:0"):
            paged.generate(**moved, max_new_tokens=8, **options)
    found = paged.generate(**moved, max_new_tokens=8, **options)
    assert torch.equal(found.cpu(), dense.generate(**inputs, max_new_tokens=8, **options))
