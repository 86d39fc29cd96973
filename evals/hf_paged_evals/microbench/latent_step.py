"""A decode step over latents (MLA): absorbed in a packed step, gathered and expanded from pages, and dense.

A DeepSeek-V3 of few small layers with random weights; its heads, its latents and their rope parts have the sizes of the
real one. Pages and caches are filled with random latents, of which the time of a step does not depend, and grow by one
token per step.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_paged.execution.model_runner import ModelRunner
from hf_paged.memory.kv_storage import KVStorage
from hf_paged.models.refusal import Refusal
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk, Scheduler
from hf_paged_evals.microbench.decode_step import cache_of, stepper_over
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_integrations.transformers.trial import make_engine

NAME = "latent_step"
QUICK = {"case": ["1x64"], "hidden": 64, "heads": 4, "layers": 1, "repeats": 1}
_ABSORBED, _GATHERED, _DENSE = "absorbed", "gathered", "dense"
_VOCAB = 1000


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    cases = ["1x1024", "1x4096", "8x1024", "8x4096"]
    parser.add_argument("--case", nargs="+", default=cases, help=f"rows x context (default: {' '.join(cases)})")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of a step, by case and contender, and the bytes of a token."""
    torch.manual_seed(given.seed)
    dense, paged = (build_model(given, implementation) for implementation in ("sdpa", "paged"))
    engine = make_engine(paged, torch.device("cpu"))
    if isinstance(engine, Refusal):
        raise RuntimeError(f"the model does not run packed: {engine.why}")
    figures, rows = [], []
    for case in given.case:
        batch, length = map(int, case.split("x"))
        contenders = {
            _ABSORBED: packed_stepper(paged, engine.runner, batch, length),
            _GATHERED: stepper_over(paged, cache_of(paged, *_latents(paged, batch, length)), batch),
            _DENSE: stepper_over(dense, cache_of(dense, *_latents(dense, batch, length)), batch),
        }
        seconds = {name: median(times) for name, times in take_turns(contenders, given.repeats).items()}
        for name, time in seconds.items():
            rows.append([case, name, 1000 * time, time / seconds[_ABSORBED]])
        for name in (_GATHERED, _DENSE):
            over = seconds[name] / seconds[_ABSORBED]
            figures.append(Figure(f"{case}: {name} over absorbed, time", over, "x", better="higher"))
    (group,) = engine.runner.groups
    stored = sum(storage.block_bytes // storage.shape.block_size for storage in group.layers.values())
    figures.append(Figure("KV bytes of a token in pages", stored, "bytes", better="lower"))
    figures.append(Figure("KV bytes of a token, expanded", expanded_bytes(paged), "bytes"))
    return Section(
        NAME,
        "A decode step over latents",
        f"Median times of a step in {len(given.case)} cases, {given.layers} layers of {given.heads} heads.",
        figures,
        [Table("By case", ["Rows x context", "Contender", "Step (ms)", "Over absorbed (x)"], rows)],
        notes=[f"Medians of {given.repeats} interleaved turns. Latents of 512 numbers, rope parts of 64."],
    )


def build_model(given: argparse.Namespace, implementation: str) -> PreTrainedModel:
    """A DeepSeek-V3 with random weights and dense MLPs; equal for each implementation."""
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=_VOCAB,
        hidden_size=given.hidden,
        intermediate_size=2 * given.hidden,
        num_hidden_layers=given.layers,
        first_k_dense_replace=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )
    torch.manual_seed(given.seed)
    dtype = getattr(torch, given.dtype)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype).eval()


def expanded_bytes(model: PreTrainedModel) -> int:
    """Bytes that the keys and values of a token would take, of all heads and layers."""
    config = model.config
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_hidden_layers * config.num_attention_heads * head * model.dtype.itemsize


def packed_stepper(model: PreTrainedModel, runner: ModelRunner, batch: int, length: int) -> Callable[[int], None]:
    """A function that runs a packed step of one token for each row, over pages that are filled already."""
    scheduler = Scheduler(runner.groups, token_budget=batch * length)
    for row in range(batch):
        scheduler.add(Request([row % _VOCAB] * (length - 1), [group.blocks for group in runner.groups]))
    prefill = scheduler.schedule()
    for group in runner.groups:
        for storage in group.layers.values():
            _fill(storage, prefill.chunks)
    scheduler.commit(prefill)

    def step(turn: int) -> None:
        for chunk in prefill.chunks:
            chunk.request.tokens.append(1)
        planned = scheduler.schedule()
        runner.run(model, planned.chunks)
        scheduler.commit(planned)

    return step


def _fill(storage: KVStorage, chunks: list[Chunk]) -> None:
    """Store random latents for the tokens of these chunks."""
    for chunk in chunks:
        slots = torch.tensor(chunk.request.tables[0].slots(chunk.start, chunk.end))
        latent, rope = (
            torch.randn(len(slots), 1, storage.head_dim(is_key)).to(storage.states_dtype) for is_key in (True, False)
        )
        storage.write(latent, rope, slots)


def _latents(model: PreTrainedModel, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents and rope parts of ``length - 1`` tokens."""
    dims = (model.config.kv_lora_rank, model.config.qk_rope_head_dim)
    latent, rope = (torch.randn(batch, 1, length - 1, dim).to(model.dtype) for dim in dims)
    return latent, rope


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
