"""The memory of a run above the loaded model: against the forecast of ``hf-paged plan``, and against dense.

Each run is a process of its own, which builds a model of random weights and real proportions. The peak is the kernel's,
from when the model is there: the first call's code, kernels and caches count.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_paged
from hf_paged.cli.plan.footprint import footprint
from hf_paged.cli.plan.plan import Plan
from hf_paged_evals.models.pair import quiet
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_evals.speed.memory_probe import measure as measure_memory

NAME = "resident"
QUICK = {"models": ["gpt2"], "layers": 2, "rows": 4, "context": 64, "long_context": 0, "dtypes": ["float32"]}
_MIB = 2**20
_LLAMA = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
# Model type and fields of each; the number of layers is `num_hidden_layers` in all of them.
MODELS: dict[str, tuple[str, dict]] = {
    "smollm2": ("llama", {**_LLAMA, "num_hidden_layers": 30, "vocab_size": 49_152, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"num_hidden_layers": 12}),
    "gemma3": (
        "gemma3_text",
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "vocab_size": 262_144,
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "hidden_size": 768,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "vocab_size": 32_000,
        },
    ),
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a run (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row at its end (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of each model (default: those that it has)")
    parser.add_argument(
        "--long-context",
        type=int,
        default=32_000,
        help="tokens of one row, dense against paged on the smallest budget that holds it; 0: none "
        "(default: %(default)s)",
    )


def measure(given: argparse.Namespace) -> Section:
    """Peaks of runs in fresh processes, and what was said of them before."""
    figures, rows, flags = [], [], []
    for name in given.models:
        for dtype in given.dtypes:
            plan = _plan(name, dtype, given.rows, given.context, given.layers)
            planned = plan.run_bytes(2**40) / _MIB
            seen = _run(name, dtype, given.rows, given.context, given.layers, "paged", None)["peak"]
            rows.append([name, dtype, plan.kv_bytes / _MIB, planned, seen, 100 * (planned / seen - 1)])
            figures.append(Figure(f"{name}, {dtype}: planned over taken", planned / seen, "x"))
            figures.append(Figure(f"{name}, {dtype}: planned", planned, "MiB"))
            figures.append(Figure(f"{name}, {dtype}: taken", seen, "MiB", better="lower"))
            if not given.quick and not 0.9 <= planned / seen <= 1.1:
                flags.append(f"{name} in {dtype} was planned at {planned:.0f} MiB and takes {seen:.0f} MiB")
    tables = [Table("Above the loaded model", ["Model", "Dtype", "KV (MiB)", "Planned", "Taken", "Off (%)"], rows)]
    if given.long_context:
        tables.append(_long(given, figures, flags))
    return Section(NAME, "Resident memory of a run", "Each in a fresh process.", figures, tables, flags=flags)


def _long(given: argparse.Namespace, figures: list[Figure], flags: list[str]) -> Table:
    """One long row in SmolLM2's proportions, dense and on a budget."""
    context, rows = given.long_context, []
    budget = _plan("smollm2", "float32", 1, context, given.layers).budget_needed
    for implementation, stated in (("sdpa", None), ("paged", budget)):
        seen = _run("smollm2", "float32", 1, context, given.layers, implementation, stated)
        rows.append([implementation, None if stated is None else stated / _MIB, seen["peak"], seen["new"]])
        figures.append(Figure(f"{context} tokens: {implementation}", seen["peak"], "MiB", better="lower"))
    if not rows[1][2] <= 1.02 * budget / _MIB < rows[0][2]:
        flags.append(f"{context} tokens: the run left its budget, or the budget is not below the peak of dense")
    return Table(f"One row of {context:,} tokens", ["Attention", "Budget (MiB)", "Peak (MiB)", "New tokens"], rows)


def _config(name: str, positions: int, layers: int | None) -> PreTrainedConfig:
    kind, fields = MODELS[name]
    fields = fields | {"max_position_embeddings": max(1024, positions)}
    config = CONFIG_MAPPING[kind](**fields | ({} if layers is None else {"num_hidden_layers": layers}))
    config.pad_token_id = 0
    return config


def _plan(name: str, dtype: str, rows: int, context: int, layers: int | None) -> Plan:
    chosen = getattr(torch, dtype)
    return Plan(footprint(_config(name, context, layers), chosen), rows, context, 16, chosen)


def _run(name: str, dtype: str, rows: int, context: int, layers: int | None, implementation: str, budget) -> dict:
    """Run a model in a process of its own: its peak in MiB above the loaded model, and the new tokens of a row.

    Raises
    ------
    RuntimeError
        If the process fails.
    """
    command = [sys.executable, "-m", "hf_paged_evals.microbench.resident", "--child"]
    given = json.dumps([name, dtype, rows, context, layers, implementation, budget])
    done = subprocess.run([*command, given], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that runs {name} in {dtype} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, dtype: str, rows: int, context: int, layers: int | None, implementation: str, budget) -> dict:
    quiet()
    torch.manual_seed(0)
    config = _config(name, context, layers)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=implementation)
    if implementation == "paged":
        hf_paged.configure(model.eval(), hf_paged.PagedConfig(memory_budget=budget))
    new = min(16, context // 2)
    # The last token of a row is not stored: no one needs its logits.
    ids = torch.randint(3, config.vocab_size, (rows, context + 1 - new))
    arguments = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    gc.collect()
    if sys.platform == "linux":  # What building the model has left behind would be taken first.
        ctypes.CDLL(None).malloc_trim(0)
    outputs: list[torch.Tensor] = []
    seen = measure_memory(lambda: outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)))
    return {"peak": seen["peak"], "new": outputs[0].shape[1] - ids.shape[1]}


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_child(*json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
