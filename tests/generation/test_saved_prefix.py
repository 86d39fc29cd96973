"""Prefixes in files: another process answers its first request from one, and whatever is wrong with one is refused."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import DynamicCache

import hf_paged
from hf_paged import PagedConfig
from hf_paged.atomic import atomically
from hf_paged.generation import prefix_file
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models import registry
from hf_paged_integrations.transformers import saved_prefix
from support import interrupts, zoo
from support.installed import CHECKOUT, ROOT
from support.interrupts import Interrupt, InterruptedAt
from support.packing import LENGTHS, compare
from support.parity import assert_rows_equal
from support.prefixes import found, own_pair

TOKENS = 40  # Saved of a prompt of 43: blocks hold 4.
INPUTS = zoo.prompts([43])
PREFIX = INPUTS["input_ids"][:, : TOKENS + 2]


def build(name="llama", dtype=torch.float32, config=None, **overrides):
    """A paged model, as another process would make it."""
    model = zoo.build(name, "paged", dtype, **overrides)
    hf_paged.configure(model, config or PagedConfig(block_size=4))
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefix.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved prefix of the llama."""
    path = tmp_path_factory.mktemp("saved") / "prefix.safetensors"
    assert hf_paged.save_prefix(build(), path, PREFIX) == TOKENS
    return path


def state(model):
    """All that the pool of a model says of its blocks, in their order."""
    return [
        (
            list(group.blocks._free),
            list(group.blocks._cached),
            group.blocks.high_water,
            group.blocks.num_evictions,
            group.blocks.used_blocks,
        )
        for pool in registry.pools_under(model)
        for group in pool.groups.values()
    ]


@contextlib.contextmanager
def refused(model, text, kind=hf_paged.SavedPrefixError):
    """The file is refused in a sentence that says so, and the pool is as it was."""
    model.generate(
        **zoo.prompts([6], seed=9), max_new_tokens=1, pad_token_id=0
    )  # The pool is there, with a block in it.
    before = state(model)
    with pytest.raises(kind, match=text):
        yield
    assert state(model) == before


def in_a_process(code, *arguments):
    """The output of `code` in a new process, whose sets have other orders."""
    paths = [*map(str, (*CHECKOUT, ROOT / "tests")), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What it is for.


CHILD = """
import json, sys, torch
import hf_paged
from support import zoo
from support.packing import LENGTHS

outputs = {}
for name, overrides in json.loads(sys.argv[2]).items():
    model = zoo.build(name, "paged", **overrides)
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=4))
    loaded = hf_paged.load_prefix(model, f"{sys.argv[1]}/{name}")
    tokens = model.generate(**zoo.prompts([43]), **LENGTHS)
    stats = hf_paged.stats(model)
    assert stats.packed_calls == 1 and stats.page_reads and not stats.gathers and not stats.used_blocks
    outputs[name] = loaded, stats.prefix_hit_tokens, tokens.tolist()
print(json.dumps(outputs))
"""


def test_a_restarted_process_answers_its_first_request_from_the_file(tmp_path):
    """Every kind of attention: several groups, windows, sinks, one KV head."""
    kinds = {name: {} for name in zoo.NAMES} | {"qwen2": {"num_key_value_heads": 1}}
    for name, overrides in kinds.items():
        assert hf_paged.save_prefix(build(name, **overrides), tmp_path / name, PREFIX) == TOKENS
    outputs = json.loads(in_a_process(CHILD, str(tmp_path), json.dumps(kinds)).splitlines()[-1])
    for name, overrides in kinds.items():
        loaded, hits, tokens = outputs[name]
        assert loaded == hits == TOKENS, name
        dense = zoo.build(name, zoo.dense_implementation(name), **overrides)
        assert_rows_equal(dense, INPUTS, dense.generate(**INPUTS, **LENGTHS), torch.tensor(tokens))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_longer_prompts_and_the_prefix_itself_find_it(name, path):
    dense = zoo.pair(name)[0]
    hf_paged.save_prefix(build(name), path, PREFIX)
    for length, hits in ((TOKENS, TOKENS - 4), (TOKENS + 1, TOKENS), (60, TOKENS)):
        model, inputs = build(name), zoo.prompts([60], seed=length)
        assert hf_paged.load_prefix(model, path) == TOKENS
        inputs["input_ids"][:, :TOKENS] = PREFIX[:, :TOKENS]
        inputs = {key: value[:, :length] for key, value in inputs.items()}
        compare((dense, model), inputs)
        assert found(model) == hits


def test_a_prompt_that_leaves_the_prefix_finds_what_it_shares(saved):
    model, inputs = build(), zoo.prompts([43])
    hf_paged.load_prefix(model, saved)
    inputs["input_ids"][:, 21] = (inputs["input_ids"][:, 21] + 1) % 90 + 3
    compare((zoo.pair("llama")[0], model), inputs)
    assert found(model) == 20


def test_a_prefix_that_is_cached_is_not_run_again_and_one_that_is_loaded_stays_as_it_is(path, rows):
    model = build()
    compare((zoo.pair("llama")[0], model), INPUTS)
    before, steps = state(model), len(rows)
    assert hf_paged.save_prefix(model, path, PREFIX) == TOKENS and hf_paged.load_prefix(model, path) == TOKENS
    assert len(rows) == steps and hf_paged.stats(model).packed_calls == 1
    assert [sorted(cached) for _, cached, *_ in state(model)] == [sorted(cached) for _, cached, *_ in before]


def test_what_is_missing_of_a_prefix_is_loaded_beside_what_is_there(saved):
    model = build()
    compare((zoo.pair("llama")[0], model), {key: value[:, :22] for key, value in INPUTS.items()}, max_new_tokens=1)
    there = hf_paged.stats(model).cached_blocks
    assert hf_paged.load_prefix(model, saved) == TOKENS
    assert hf_paged.stats(model).cached_blocks == TOKENS // 4 and there == 5
    compare((zoo.pair("llama")[0], model), INPUTS)
    assert found(model) == TOKENS


@pytest.mark.parametrize("shape", ["list", "row", "batch of one", "int32"])
def test_ids_come_in_any_shape_of_one_prompt(shape, path, saved):
    ids = {"list": PREFIX[0].tolist(), "row": PREFIX[0], "batch of one": PREFIX, "int32": PREFIX.int()}[shape]
    hf_paged.save_prefix(build(), path, ids)
    assert path.read_bytes() == saved.read_bytes()


def test_several_prefixes_share_their_beginning(tmp_path):
    model = build()
    longer = torch.cat([PREFIX[:, :20], zoo.prompts([20], seed=1)["input_ids"]], dim=1)
    for name, ids in (("one", PREFIX), ("two", longer)):
        hf_paged.save_prefix(model, tmp_path / name, ids)
    model = build()
    for name in ("one", "two", "one"):
        assert hf_paged.load_prefix(model, tmp_path / name) == TOKENS
    assert hf_paged.stats(model).cached_blocks == 15
    for ids in (PREFIX, longer):
        hits, inputs = found(model), {"input_ids": torch.cat([ids[:, :TOKENS], ids[:, :3]], dim=1)}
        compare((zoo.pair("llama")[0], model), {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
        assert found(model) == hits + TOKENS


def test_salts_are_apart(path):
    config = PagedConfig(block_size=4, cache_salt="the server's")
    with hf_paged.cache_salt("tenant 7"):
        hf_paged.save_prefix(build(config=config), path, PREFIX)
    assert b"tenant 7" not in path.read_bytes() and b"server" not in path.read_bytes()
    model = build(config=config)
    for salt in ("", "tenant 8"):
        with refused(model, "another cache salt.*Remedy: load it inside the hf_paged.cache_salt"):
            with hf_paged.cache_salt(salt):
                hf_paged.load_prefix(model, path)
    model = build(config=config)
    with hf_paged.cache_salt("tenant 7"):
        hf_paged.load_prefix(model, path)
    compare((zoo.pair("llama")[0], model), INPUTS)
    assert found(model) == 0
    with hf_paged.cache_salt("tenant 7"):
        compare((zoo.pair("llama")[0], model), INPUTS)
    assert found(model) == TOKENS
    model = build()
    with refused(model, "another cache salt"), hf_paged.cache_salt("tenant 7"):
        hf_paged.load_prefix(model, path)


def lora(name, seed=0):
    model = build()
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    wrapped.set_adapter(name)
    return wrapped.eval()


def test_the_active_adapter_belongs_to_the_prefix(path, saved):
    hf_paged.save_prefix(lora("one"), path, PREFIX)
    model = lora("one")
    assert hf_paged.load_prefix(model, path) == TOKENS
    dense = own_pair()[0]
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_lora_weights=False)
    dense = peft.get_peft_model(dense, config, adapter_name="one").eval()
    compare((dense, model), INPUTS)
    assert found(model) == TOKENS
    for other in (lora("two"), lora("one", seed=1)):
        with refused(other, "refused"):
            hf_paged.load_prefix(other, path)
    with refused(model, "refused"):
        hf_paged.load_prefix(model, saved)
    model.set_adapter("two")
    with refused(model, "other adapters or other attributes"):
        hf_paged.load_prefix(model, path)
    model.set_adapter("one")
    hf_paged.load_prefix(model, path)


def test_beside_calls_of_other_threads(saved, tmp_path):
    dense, model = zoo.pair("llama")[0], build(config=PagedConfig(block_size=4, token_budget=8))
    expected, outputs = dense.generate(**INPUTS, **LENGTHS), []

    def work(number):
        if number % 2:
            hf_paged.load_prefix(model, saved)
            hf_paged.save_prefix(model, tmp_path / str(number), PREFIX)
        outputs.append(model.generate(**INPUTS, **LENGTHS))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outputs) == 6 and all(torch.equal(output, expected) for output in outputs)
    assert {(tmp_path / str(number)).stat().st_size for number in (1, 3, 5)} == {saved.stat().st_size}


def test_loaded_blocks_are_evicted_in_their_turn(saved):
    model = build(config=PagedConfig(block_size=4, memory_budget=14 * 2048, prefix_cache_share=1.0))
    hf_paged.load_prefix(model, saved)
    assert hf_paged.stats(model).cached_blocks == 10
    compare((zoo.pair("llama")[0], model), zoo.prompts([30], seed=3), max_new_tokens=2)
    assert hf_paged.stats(model).evictions
    compare((zoo.pair("llama")[0], model), INPUTS, max_new_tokens=2)
    assert 0 < found(model) < TOKENS


# Which model, and which pool.


def edited(model):
    """One element, of the many that a fingerprint does not sample."""
    model.model.layers[1].mlp.down_proj.weight.data[17, 23] += 1e-3
    return model


OTHERS = {
    "edited": (lambda: edited(build()), "other weights"),
    "other dtype": (lambda: build(dtype=torch.bfloat16), r"a layer lies in other pages, .*torch.float32.*bfloat16"),
    "other heads": (lambda: build(num_key_value_heads=4), "a layer lies in other pages"),
    "more layers": (lambda: build(num_hidden_layers=3), "a layer lies in other pages, nothing, and the model's in"),
    "fewer layers": (lambda: build(num_hidden_layers=1), "other weights"),
    "other rope": (lambda: build(rope_parameters={"rope_type": "default", "rope_theta": 999.0}), "refused"),
    "other model": (lambda: build("qwen3"), "saved with a .*LlamaForCausalLM.*, and this is a .*Qwen3ForCausalLM"),
    "in training": (lambda: build().train(), r"another config, other adapters.*eval\(\) included, .*5\.\d+\.\d"),
    "block size": (
        lambda: build(config=PagedConfig(block_size=8)),
        r"its blocks hold 4 tokens, and those of the pool 8.*PagedConfig\(block_size=4\)",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_or_pool_is_refused(other, saved):
    make, text = OTHERS[other]
    model = make()
    with refused(model, text):
        hf_paged.load_prefix(model, saved)


def test_a_scale_that_no_weight_shows_is_seen(saved):
    model = build()
    model.model.layers[0].self_attn.scaling *= 1.01
    with refused(model, "another config, other adapters or other attributes"):
        hf_paged.load_prefix(model, saved)
    model.model.layers[0].self_attn.scaling /= 1.01


def hooked():
    model = build()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    return model


def compiled_elsewhere():
    model = build()
    model.set_attn_implementation("sdpa")
    return model


NOT_SERVED = {
    "prefix cache off": (lambda: build(config=PagedConfig(block_size=4, prefix_cache=False)), "this model's is off"),
    "foreign code": (hooked, "does not serve this model: a class, function, hook"),
    "dense": (compiled_elsewhere, "attends with 'sdpa'"),
    "not packed": (
        lambda: build(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "because the rotary frequencies depend on the whole forward. Remedy",
    ),
}


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_a_model_that_cannot_have_prefixes_is_refused(kind, saved, path):
    make, text = NOT_SERVED[kind]
    model = make()
    for call in (lambda: hf_paged.load_prefix(model, saved), lambda: hf_paged.save_prefix(model, path, PREFIX)):
        with pytest.raises(hf_paged.UnsupportedError, match=text):
            call()
    assert not path.exists()


def test_what_is_no_model_is_refused(saved):
    with pytest.raises(TypeError, match="expected a model, got str"):
        hf_paged.load_prefix("gpt2", saved)
    with pytest.raises(hf_paged.UnsupportedError, match="Linear has no model inside that generates"):
        hf_paged.load_prefix(torch.nn.Linear(2, 2), saved)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (PREFIX.float(), "input_ids are torch.float32 of shape"),
        (PREFIX.repeat(2, 1), r"of shape \[2, 42\], and integers of shape \[tokens\]"),
        (PREFIX[:, :3], "3 tokens, and full blocks of 4 are saved: save a longer prefix"),
        ([5, 6, 7, 97], "token 97 is not one of the 97 that the model knows"),
        ([5, 6, 7, -1], "token -1 is not one"),
    ],
    ids=["floats", "two rows", "short", "unknown", "negative"],
)
def test_wrong_ids_are_refused(ids, text, path):
    with pytest.raises(hf_paged.SavedPrefixError, match=text):
        hf_paged.save_prefix(build(), path, ids)
    assert not path.exists()


SMALL = {
    "share": (PagedConfig(block_size=4, memory_budget=40 * 2048), "takes 10 blocks, and 5 of 40 may be cached: raise"),
    "pool": (PagedConfig(block_size=4, memory_budget=6 * 2048, prefix_cache_share=1), "10 blocks, and 6 of 6 may"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_pool_that_cannot_keep_it_says_what_it_would_take(kind, saved):
    config, text = SMALL[kind]
    model = build(config=config)
    with refused(model, text, hf_paged.OutOfBlocksError):
        hf_paged.load_prefix(model, saved)


def test_a_prefix_longer_than_the_pool_is_not_saved(path):
    model = build(config=PagedConfig(block_size=4, memory_budget=6 * 2048))
    with pytest.raises(hf_paged.OutOfBlocksError, match="needs 10 blocks, 6 of 6 are free"):
        hf_paged.save_prefix(model, path, PREFIX)
    assert not path.exists()


def test_a_pool_in_use_says_so_and_evicts_nothing(saved):
    model = build(config=PagedConfig(block_size=4, memory_budget=14 * 2048, prefix_cache_share=1.0))
    compare((zoo.pair("llama")[0], model), zoo.prompts([11], seed=3), max_new_tokens=1)  # Two cached blocks.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(zoo.prompts([20], seed=5)["input_ids"], past_key_values=cache)
    with refused(model, "needs 10 blocks, 9 of 14 are free", hf_paged.OutOfBlocksError):
        hf_paged.load_prefix(model, saved)
    del cache


# Which file.


def test_there_is_no_file(tmp_path):
    model = build()
    with pytest.raises(FileNotFoundError):
        hf_paged.load_prefix(model, tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with refused(model, "it is no regular file"):
            hf_paged.load_prefix(model, path)


@pytest.fixture(scope="module")
def reader():
    """A model into which many files are loaded."""
    return build()


@given(data=st.data())
def test_whatever_was_altered_or_cut_off_is_refused(data, saved, reader, tmp_path_factory):
    whole = saved.read_bytes()
    content = bytearray(whole)
    head = 8 + int.from_bytes(whole[:8], "little")
    for place in data.draw(st.lists(st.one_of(st.integers(0, head), st.integers(0, len(whole) - 1)), max_size=4)):
        content[place] = data.draw(st.one_of(st.just(content[place] ^ 1), st.just(9), st.integers(0, 255)))
    match data.draw(st.sampled_from(["as it is", "cut", "longer"])):
        case "cut":
            del content[data.draw(st.integers(0, len(whole) - 1)) :]
        case "longer":
            content += data.draw(st.binary(min_size=1, max_size=9))
    path = tmp_path_factory.getbasetemp() / "altered"
    path.write_bytes(content)
    if content == whole:
        return
    with refused(reader, "the saved prefix .*altered is refused, and nothing was changed: .*Remedy: "):
        hf_paged.load_prefix(reader, path)


def resealed(saved, path, change):
    """Write the file again, with a right digest, after a change of its header and tensors."""
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["hf_paged.prefix"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    change(header, tensors)
    prefix_file.write(str(path), header, tensors)


def field(name, value):
    return lambda header, tensors: header.update({name: value})


def deep(header, tensors):
    header["written_by"] = value = []
    for _ in range(900):
        value.append([])
        value = value[0]


CRAFTED = {
    "version": (field("version", 2), "format has version 2, and this hf_paged reads 1"),
    "true is not one": (field("version", True), "format has version true"),
    "one point is not one": (field("version", 1.0), "format has version 1.0"),
    "no tokens": (field("num_tokens", 0), "it has 0 tokens, where full blocks"),
    "half a block": (field("num_tokens", 42), "it has 42 tokens, where full blocks"),
    "negative": (field("num_tokens", -4), "it has -4 tokens, where"),
    "huge": (field("num_tokens", int("4" * 4000)), "a layer lies in other pages"),
    "a list": (field("num_tokens", [40]), r"it has \[40\] tokens, where"),
    "no layer": (lambda header, tensors: header.pop("layer.1"), "other pages, nothing, and"),
    "one more layer": (field("layer.2", {}), "fields or tensors of other names"),
    "one more field": (field("code", "import os"), "fields or tensors of other names"),
    "long": (field("model", "x" * 10**6), r"it was saved with a \"x{159}\.\.\., and"),
    "deep": (deep, None),
    "other format": (
        lambda header, tensors: header["layer.0"].update(format="Int8Format"),
        'a layer lies in other pages, .*"Int8Format"',
    ),
    "fewer tensors": (lambda header, tensors: tensors.pop("layer.0.part.1"), "fields or tensors of other names"),
    "another tensor": (
        lambda header, tensors: tensors.update(code=torch.zeros(1)),
        "fields or tensors of other names",
    ),
    "other dtype": (
        lambda header, tensors: tensors.update({"layer.0.part.1": tensors["layer.0.part.1"].double()}),
        r"its tensor layer.0.part.1 is torch.float64 \[10, 2, 4, 16\], where torch.float32",
    ),
    "other shape": (
        lambda header, tensors: tensors.update({"layer.1.part.0": tensors["layer.1.part.0"][:9].clone()}),
        r"is torch.float32 \[9, 2, 4, 16\], where torch.float32 \[10, 2, 4, 16\] is expected",
    ),
    "tokens of floats": (
        lambda header, tensors: tensors.update(tokens=tensors["tokens"].double()),
        r"its tensor tokens is torch.float64 \[40\], where torch.int64",
    ),
    "unknown token": (lambda header, tensors: tensors["tokens"].fill_(97), "token 97 is not one of the 97"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_file_that_says_what_is_not_so_is_refused_field_by_field(kind, saved, reader, path):
    change, text = CRAFTED[kind]
    resealed(saved, path, change)
    if text is None:
        assert hf_paged.load_prefix(reader, path) == TOKENS  # Who wrote it is for people.
        return
    with refused(reader, text):
        hf_paged.load_prefix(reader, path)


@pytest.mark.parametrize("text", ['{{"sha256": "{0}", "deep": {1}}}', '["{0}"]', '{{"sha256": ["{0}"]}}'])
def test_a_header_that_is_no_flat_object_is_refused(text, reader, path, monkeypatch):
    text = text.format("0" * 64, "[" * 10**5 + "]" * 10**5)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_file, "json", SimpleNamespace(dumps=lambda *_, **__: text))
        prefix_file.write(str(path), {}, {})
    with refused(reader, "it is no saved prefix, or not a whole one"):
        hf_paged.load_prefix(reader, path)


def test_a_header_longer_than_any_is_refused(reader, path):
    path.write_bytes((2**40).to_bytes(8, "little") + bytes(100))
    with refused(reader, "a header of 1,099,511,627,776 bytes, where 16,777,216 is the limit"):
        hf_paged.load_prefix(reader, path)


def test_a_model_of_safetensors_is_no_prefix(reader, tmp_path):
    reader.save_pretrained(tmp_path)
    with refused(reader, "it is no saved prefix, or not a whole one .its metadata is not that of one"):
        hf_paged.load_prefix(reader, tmp_path / "model.safetensors")


def test_a_file_that_is_replaced_meanwhile_is_refused(saved, reader, path, monkeypatch):
    path.write_bytes(saved.read_bytes())
    checked = prefix_file._checked_header

    def replaced(*arguments):
        (path.parent / "new").write_bytes(saved.read_bytes())
        os.replace(path.parent / "new", path)
        return checked(*arguments)

    monkeypatch.setattr(prefix_file, "_checked_header", replaced)
    with refused(reader, "it was replaced while it was read. Remedy: load it again"):
        hf_paged.load_prefix(reader, path)


# Faults.


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_fault_while_pages_are_written_leaves_nothing(kind, at, error, path, monkeypatch):
    hf_paged.save_prefix(build(kind), path, PREFIX)
    model, write, calls = build(kind), KVStorage.write_blocks, []

    def failing(self, blocks, parts):
        calls.append(1)
        if len(calls) == at:
            raise error("simulated")
        write(self, blocks, parts)

    with monkeypatch.context() as patch:
        patch.setattr(KVStorage, "write_blocks", failing)
        with pytest.raises(error):
            hf_paged.load_prefix(model, path)
    stats = hf_paged.stats(model)
    assert (stats.used_blocks, stats.cached_blocks) == (0, 0)
    compare((zoo.pair(kind)[0], model), INPUTS)
    assert found(model) == 0
    assert hf_paged.load_prefix(model, path) == TOKENS


@pytest.mark.parametrize("is_saving", [False, True], ids=["loading", "saving"])
def test_a_model_that_is_changed_meanwhile_is_noticed(is_saving, saved, path, monkeypatch):
    model = build()
    name = "read_blocks" if is_saving else "write_blocks"
    original = getattr(KVStorage, name)

    def changing(self, *arguments):
        model.lm_head.weight.data.mul_(1.5)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(KVStorage, name, changing)
        with pytest.raises(hf_paged.SavedPrefixError, match="the model was changed while"):
            hf_paged.save_prefix(model, path, PREFIX) if is_saving else hf_paged.load_prefix(model, saved)
    assert not path.exists() and hf_paged.stats(model).used_blocks == 0
    model.generate(**INPUTS, **LENGTHS)
    assert found(model) == 0


def test_while_calls_run_that_found_another_model_nothing_is_loaded(saved):
    """Blocks that they have yet to store would be entered under the model as it is now."""
    model, calls = build(), []

    class Streamer:
        def put(self, value):
            calls.append(value)
            if len(calls) < 3:  # The prompt, and the first token.
                return
            model.model.rotary_emb.attention_scaling = 1.5
            hf_paged.save_prefix(model, saved.parent / "never", PREFIX)

        def end(self):
            pass

    with pytest.raises(hf_paged.SavedPrefixError, match="calls run that began before the model was changed"):
        model.generate(**INPUTS, **LENGTHS, streamer=Streamer())
    assert not (saved.parent / "never").exists() and hf_paged.stats(model).used_blocks == 0


def test_blocks_that_are_evicted_before_they_are_read_are_an_error(path, monkeypatch):
    model, run = build(), saved_prefix._run

    def evicting(model, tokens, device):
        run(model, tokens, device)
        for pool in registry.pools_under(model):
            for group in pool.groups.values():
                for block in list(group.blocks._cached):
                    group.blocks.evict(block)

    monkeypatch.setattr(saved_prefix, "_run", evicting)
    with pytest.raises(hf_paged.SavedPrefixError, match="evicted before they could be read, 3 times: save it while"):
        hf_paged.save_prefix(model, path, PREFIX)
    assert not path.exists()


# Where a save or a load is interrupted: the inspection of the model, which is most of it, changes nothing.
INTERRUPTED = ("hf_paged.atomic", "hf_paged.generation.", "hf_paged_integrations.transformers.saved_prefix")


@settings(max_examples=60)
@given(at=st.integers(1, 420), is_saving=st.booleans())
def test_an_interrupt_at_any_line_leaves_a_whole_pool_and_no_half_file(at, is_saving, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    model = build()
    if is_saving:  # The trial of the model, and its first run, are for other tests.
        model.generate(**INPUTS, max_new_tokens=1, pad_token_id=0)
    else:
        model.generate(**zoo.prompts([6], seed=9), max_new_tokens=1, pad_token_id=0)
    tracer = InterruptedAt(at)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupt), tracer:
        patch.setattr(interrupts, "_PACKAGES", INTERRUPTED)
        if is_saving:
            hf_paged.save_prefix(model, folder / "prefix", PREFIX)
        else:
            hf_paged.load_prefix(model, saved)
    atomically(lambda: None)  # What a finalizer had to leave to the worker has run.
    assert hf_paged.stats(model).used_blocks == 0, tracer.fired
    assert os.listdir(folder) in ([], ["prefix"]), tracer.fired
    for pool in registry.pools_under(model):
        pool.check_integrity()
    if os.listdir(folder):
        assert hf_paged.load_prefix(build(), folder / "prefix") == TOKENS
    assert hf_paged.load_prefix(model, saved) == TOKENS
    compare((zoo.pair("llama")[0], model), INPUTS, max_new_tokens=2)


def test_a_prefix_is_loaded_on_another_device(saved, path, fake_device):
    config = PagedConfig(block_size=4, memory_budget="1MiB")
    inputs = {key: value.to(fake_device.device) for key, value in INPUTS.items()}
    expected = zoo.pair("llama")[0].generate(**INPUTS, **LENGTHS)
    model = build(config=config).to(fake_device.device)
    assert hf_paged.load_prefix(model, saved) == TOKENS
    assert torch.equal(model.generate(**inputs, **LENGTHS).cpu(), expected) and found(model) == TOKENS
    assert hf_paged.save_prefix(model, path, inputs["input_ids"][:, :TOKENS]) == TOKENS
    model = build()
    assert hf_paged.load_prefix(model, path) == TOKENS
    assert torch.equal(model.generate(**INPUTS, **LENGTHS), expected) and found(model) == TOKENS


WRITER = """
import os, resource, sys, torch
import hf_paged
from support import zoo

model = zoo.build("llama", "paged")
hf_paged.configure(model, hf_paged.PagedConfig(block_size=4))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    hf_paged.save_prefix(model, sys.argv[1], zoo.prompts([43])["input_ids"])
except hf_paged.SavedPrefixError as error:
    print(error)
assert hf_paged.stats(model).used_blocks == 0
"""


def test_a_full_disk_leaves_what_was_there_and_nothing_else(saved, tmp_path):
    """The system refuses to let the file grow, as a full disk does; for the data, and for the header."""
    path = tmp_path / "prefix"
    path.write_text("old")
    for limit in (saved.stat().st_size - 1, 100):
        printed = in_a_process(WRITER, str(path), str(limit))
        assert "cannot be written to" in printed and "free as much" in printed, printed
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["prefix"]


@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_no_step_of_writing_leaves_anything_behind(name, error, tmp_path, monkeypatch):
    path, model = tmp_path / "prefix", build()
    path.write_text("old")

    def failing(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(prefix_file.os, name, failing)
        kind = hf_paged.SavedPrefixError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind):
            hf_paged.save_prefix(model, path, PREFIX)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["prefix"]
    assert hf_paged.save_prefix(model, path, PREFIX) == TOKENS and path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(hf_paged.SavedPrefixError, match="cannot be written to .*none/prefix.*name a path in a folder"):
        hf_paged.save_prefix(build(), tmp_path / "none" / "prefix", PREFIX)
