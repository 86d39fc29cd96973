"""The command hf-paged plan: what it prints, advises and refuses."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_paged import PagedError
from hf_paged.cli import main
from hf_paged.cli.plan import footprint as plan_footprint
from hf_paged.cli.plan import report
from hf_paged.cli.plan.footprint import footprint, read_config
from support import zoo

BATCH, CONTEXT = 3, 30


def save(tmp_path, name="llama", **overrides):
    zoo.build(name, "sdpa", **overrides).config.save_pretrained(tmp_path)
    return str(tmp_path)


def run(*arguments, batch=BATCH, context=CONTEXT):
    return main.main(["plan", *arguments, "--batch", str(batch), "--context", str(context)])


def test_the_command(tmp_path, capsys):
    assert run(save(tmp_path), "--dtype", "bfloat16", "--memory-budget", "1MiB") == 0
    out = capsys.readouterr().out
    # 2 blocks of 16 in each of 3 rows; a block has 2 layers, 2 heads, keys and values of 16: 4 KiB in bf16.
    assert out.splitlines()[4].split() == ["full", "attention", *"2 2 x (16 + 16) 2 6 24.0 KiB".split()]
    lines = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert lines["float32"][1:] == "45.0 KiB 48.0 KiB 48.0 KiB 96.0 KiB 192 KiB".split()
    assert lines['kv_dtype="int8"'][1:] == "15.0 KiB 15.0 KiB 30.0 KiB 60.0 KiB".split()
    assert lines["bfloat16 or float16"][3:] == "22.5 KiB 24.0 KiB 24.0 KiB 48.0 KiB 96.0 KiB".split()
    # 7.5 and 15 slots of 2 x 16 in a row.
    assert lines["empty slots, average"][3:] == "23.4% 48.4% 49.2% 49.6%".split()
    assert lines["empty slots, at most"][4:] == "46.9% 96.9% 98.4% 99.2%".split()
    assert "It fits." in out and "1.00 MiB (as asked for)" in out
    assert "a packed step runs 512 tokens at most (the default for cpu), of 512 rows." in out
    assert "A greedy run takes" in out and "24.0 KiB of blocks" in out


def test_the_command_takes_the_dtype_of_the_config(tmp_path, capsys):
    assert run(save(tmp_path, dtype=torch.float16)) == 0
    assert f"Batch {BATCH}, context {CONTEXT}, float16, blocks of 16" in capsys.readouterr().out


def test_the_command_advises_when_memory_is_short(tmp_path, capsys, monkeypatch):
    folder = save(tmp_path)
    assert run(folder, "--dtype", "float32", "--memory-budget", "32KiB") == 0
    out = capsys.readouterr().out
    assert "A call would go on with a warning" in out and "It fits" not in out
    advice = [line.split() for line in out[out.index("Each of these") :].splitlines()[1:7]]
    assert advice == [
        "dtype=torch.bfloat16 24.0 KiB fits".split(),
        'kv_dtype="int8" 15.0 KiB fits'.split(),
        'memory_budget="1MiB" 48.0 KiB fits'.split(),
        "a batch of at most 2 32.0 KiB fits".split(),
        "a context of at most 16 24.0 KiB fits".split(),
        [],
    ]
    monkeypatch.setattr(report, "physical_memory", lambda device: 32 * 1024)
    run(folder, "--dtype", "float32", "--memory-budget", "32KiB")
    assert "A call would stop with an OutOfBlocksError" in capsys.readouterr().out
    monkeypatch.setattr(report, "available_memory", lambda device: 1)
    run(folder, "--dtype", "float32")
    assert "the weights alone take all" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("t5", {}, "t5 is an encoder-decoder: its cross-attention depends on the source"),
        ("mamba", {"num_hidden_layers": 2}, "mamba has nothing to plan: no layer of its cache lies in pages"),
        ("jetmoe", {"num_hidden_layers": 2}, "jetmoe cannot be planned: .* without weights it does not run"),
        ("falcon", {"num_hidden_layers": 2}, "falcon cannot be planned, for it is refused .*FALCON_ATTENTION_CLASSES"),
        ("cpmant", {"num_hidden_layers": 2}, "cpmant cannot be planned: it caches 33 positions for one token"),
    ],
)
def test_a_config_that_cannot_be_planned_is_named(name, overrides, words):
    with pytest.raises(PagedError, match=words):
        footprint(CONFIG_MAPPING[name](**overrides), torch.float32)


def test_layers_that_keep_transformers_own_cache_are_named(tmp_path, capsys, monkeypatch):
    def half_paged(config):
        cache = DynamicCache(config=config)
        cache.layers[1] = DynamicLayer()
        return cache

    monkeypatch.setattr(plan_footprint, "DynamicCache", half_paged)
    assert run(save(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "1 layers with keys and values" in out and "1 more keep theirs in transformers' own DynamicLayer" in out


@pytest.mark.parametrize(
    "config, words",
    [
        (None, "holds no config that transformers can read"),
        ("{}", "holds no config that transformers can read"),
        ('{"model_type": "nonsense"}', "holds no config that transformers can read: .*nonsense"),
        ('{"model_type":', "holds no config that transformers can read: .*valid JSON"),
    ],
)
def test_a_folder_without_a_good_config(tmp_path, config, words):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(PagedError, match=words):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nobody/no-such-model"], "no config found for nobody/no-such-model: it is no local folder"),
        (["demo", "--block-size", "3"], "block_size must be a power of two"),
        (["demo", "--memory-budget", "lots"], "memory_budget must be"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, capsys):
    assert run(*arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith("hf-paged: ") and words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("numbers", [{"batch": 0}, {"context": -1}], ids=str)
def test_numbers_below_one_are_refused(numbers, capsys):
    assert run("demo", **numbers) == 1
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_model_can_be_planned(capsys):
    assert run("demo", batch=32, context=1024) == 0
    out = capsys.readouterr().out
    assert "llama: 134.5 million parameters, 30 layers" in out
    assert out.splitlines()[4].split() == ["full", "attention", *"30 3 x (64 + 64) 64 2,048 1.41 GiB".split()]
