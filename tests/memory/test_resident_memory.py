"""The budget against what the system says of a fresh process: its resident memory above the loaded model."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says it")

MIB = 2**20
# Not a loop of the test's process: whatever it imported and allocated before would be in the way.
_PROGRAM = """
import json, random, re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import hf_paged
from hf_paged.models import registry

given = json.loads(sys.argv[1])

def kibibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=8192, max_position_embeddings=512,
)
model = AutoModelForCausalLM.from_config(
    config, dtype=getattr(torch, given["dtype"]), attn_implementation="paged"
).eval()
options = {"memory_budget": given["budget"], "prefix_cache_share": 1.0} | given["config"]
hf_paged.configure(model, hf_paged.PagedConfig(**options))
chance = random.Random(0)
loaded = kibibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew.
for _ in range(given["calls"]):
    rows = [[chance.randrange(3, 8192) for _ in range(chance.randint(8, 64))] for _ in range(given["rows"])]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, eos_token_id=None, **given["options"])
stats = hf_paged.stats(model)
(group,) = registry.pools_under(model)[0].groups.values()
print(json.dumps({
    "peak": (kibibytes("VmHWM") - loaded) * 1024,
    "blocks": group.blocks.high_water * group.bytes_per_block,
    "is_full": group.blocks.high_water == group.blocks.total_blocks,
    "packed": stats.packed_calls,
    "reads": stats.page_reads,
}))
"""


def run(budget, rows=2000, calls=1, dtype="float32", config=None, **options) -> dict:
    """The report of a fresh process after so many prompts that no other equals."""
    given = {"budget": budget, "rows": rows, "calls": calls, "dtype": dtype, "config": config or {}}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(given | {"options": {"do_sample": False} | options})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "budget, how",
    [
        (96 * MIB, {}),
        (96 * MIB, {"rows": 100, "calls": 20}),
        (96 * MIB, {"repetition_penalty": 1.1, "rows": 200, "calls": 10}),
        (160 * MIB, {"config": {"token_budget": 2048}}),
        (160 * MIB, {"config": {"block_size": 4}}),
        (128 * MIB, {"dtype": "bfloat16"}),
    ],
    ids=["one call", "many calls", "processors", "large steps", "small blocks", "bfloat16"],
)
def test_2000_distinct_prompts_stay_in_the_budget(budget, how, monkeypatch):
    if how.get("dtype") == "bfloat16":  # oneDNN's kernels for each number of tokens are not ours to count.
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            monkeypatch.setenv(name, "8")
    seen = run(budget, **how)
    assert seen["packed"] == how.get("calls", 1) and seen["reads"]
    assert seen["is_full"] and seen["blocks"] > 0.4 * budget, "the prompts do not fill the budget"
    assert seen["peak"] <= 1.02 * budget


def test_some_distinct_prompts_stay_in_the_budget():
    """A run of seconds, on a pool that they fill: what the slow tier does with 2,000."""
    seen = run(64 * MIB, rows=150)
    assert seen["packed"] == 1 and seen["reads"] and seen["is_full"]
    assert seen["peak"] <= 1.02 * 64 * MIB
