"""``hf-paged plan``: a `Plan` as a newcomer reads it."""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from hf_paged.cli.plan.footprint import Footprint, GroupFootprint, footprint, read_config
from hf_paged.cli.plan.plan import BLOCK_SIZES, Memory, Plan, remedies
from hf_paged.config import PagedConfig, parse_bytes
from hf_paged.memory.sizing import (
    allowed_budget,
    available_memory,
    default_share,
    is_taken_at_once,
    physical_memory,
    step_tokens,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_plan(model: str, batch: int, context: int, config: PagedConfig, dtype: str | None = None) -> None:
    """Print what the KV cache of a model will need.

    Parameters
    ----------
    model : str
        A hub name, a local folder, or ``"demo"``.
    batch, context : int
        Rows, and tokens stored in each.
    config : PagedConfig
    dtype : str or None
        A name in `DTYPES`; None: that of the config, which ``from_pretrained`` takes as well.

    Raises
    ------
    ImportError, PagedError
        If there is no such model, or its cache cannot be planned.
    ValueError
        If one of the numbers is out of range.
    """
    for name, number in (("--batch", batch), ("--context", context)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    model_config = read_config(model)
    chosen = DTYPES[dtype] if dtype else own_dtype(model_config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(
        footprint(model_config, chosen),
        batch,
        context,
        config.block_size,
        chosen,
        config.token_budget,
        is_taken_at_once(device),
        config.prepack_weights,
        config.kv_dtype,
        config.kv_dtype_window,
    )
    stated = parse_bytes(config.memory_budget)
    budget = None if stated is None else allowed_budget(stated, device)
    memory = Memory(
        available_memory(device), physical_memory(device), budget, default_share(device), is_taken_at_once(device)
    )
    _print_model(plan.footprint)
    _print_groups(plan)
    _print_sizes(plan)
    _print_memory(plan, memory, device)
    _print_steps(plan, memory, config, device)
    _print_assumptions(plan)
    if getattr(model_config, "quantization_config", None):
        print("The weights are counted without their quantisation; with it they leave more for the KV.")


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype in which ``from_pretrained`` loads a model of this config."""
    dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def size(num_bytes: float) -> str:
    """Bytes for a reader: three or four digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1000 or unit == "GiB":
            break
        num_bytes /= 1024
    digits = 0 if unit == "bytes" or num_bytes >= 100 else 1 if num_bytes >= 10 else 2
    return f"{num_bytes:,.{digits}f} {unit}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.1f} million"


def _print_model(model: Footprint) -> None:
    stored = sum(len(group.layers) for group in model.groups)
    print(
        f"{model.model_type}: {_count(model.num_parameters)} parameters, {stored} layers with keys and values in pages"
    )
    for kind, count in model.other_layers.items():
        print(f"  {count} more keep theirs in transformers' own {kind}: not counted here")


def _print_groups(plan: Plan) -> None:
    print(f"\nBatch {plan.batch:,}, context {plan.context:,}, {_name(plan.dtype)}, blocks of {plan.block_size} tokens")
    row = "  {:<26}{:>6}  {:>24}{:>14}{:>10}{:>12}"
    print(row.format("KV cache group", "layers", "KV heads x (key + value)", "blocks a row", "blocks", "memory"))
    for group in plan.footprint.groups:
        shapes = list(dict.fromkeys(map(str, group.layers)))
        print(
            row.format(
                _name_of_group(plan, group),
                len(group.layers),
                shapes[0] if len(shapes) == 1 else f"{shapes[0]}, others",
                f"{plan.row_blocks(group):,}",
                f"{plan.blocks(group):,}",
                size(plan.blocks(group) * plan.block_bytes(group)),
            )
        )
    if plan.footprint.state_bytes:
        print(f"  recurrent layers keep {size(plan.batch * plan.footprint.state_bytes)} more, dense and paged alike")


def _name_of_group(plan: Plan, group: GroupFootprint) -> str:
    name = "full attention" if group.window is None else f"window of {group.window:,}"
    kv_dtype = plan.kv_dtype if group.window is None else plan.kv_dtype_window
    return name if kv_dtype is None else f"{name}, {kv_dtype}"


def _print_sizes(plan: Plan) -> None:
    sizes = sorted({*BLOCK_SIZES, plan.block_size})
    row = "  {:<22}" + "{:>12}" * (len(sizes) + 1)
    print("\n" + row.format("memory by block size", "dense", *sizes))
    plain = replace(plan, kv_dtype=None, kv_dtype_window=None)
    for label, dtype in (("float32", torch.float32), ("bfloat16 or float16", torch.bfloat16)):
        plans = [replace(plain, dtype=dtype, block_size=block_size) for block_size in sizes]
        print(row.format(label, size(plans[0].dense_bytes), *(size(each.kv_bytes) for each in plans)))
    if any(group.window is None for group in plan.footprint.groups):
        plans = [replace(plan, kv_dtype="int8", block_size=block_size) for block_size in sizes]
        print(row.format('kv_dtype="int8"', "", *(size(each.kv_bytes) for each in plans)))
    for label, share in (("empty slots, average", 0.5), ("empty slots, at most", 1.0)):
        plans = [replace(plan, block_size=block_size) for block_size in sizes]
        shares = (each.empty_bytes(share * (each.block_size - 1)) / each.kv_bytes for each in plans)
        print(row.format(label, "", *(f"{share:.1%}" for share in shares)))


def _print_memory(plan: Plan, memory: Memory, device: torch.device) -> None:
    weights, left, budget = plan.weight_bytes, memory.left(plan), memory.budget(plan)
    print(f"\nMemory of this machine ({device.type})")
    print(f"  available     {size(memory.available)}, {size(weights)} of it for the weights in {_name(plan.dtype)}")
    how = "as asked for" if memory.stated is not None else f"the default, {memory.share:.0%} of what the weights leave"
    print(f"  KV budget     {size(budget)} ({how})")
    needed = f"{size(plan.kv_bytes)} of KV"
    if plan.budget_needed > plan.kv_bytes:
        needed += f", in a budget of {size(plan.budget_needed)}, of which steps and all groups have a share"
    print(f"  needed        {needed}")
    if memory.fits(plan):
        print("  It fits.")
        return
    if not left:
        print("  It does not fit: the weights alone take all that is available.")
    elif not memory.holds_budget(plan):
        print("  It does not fit: the budget is allocated at once, and is larger than the memory that is left.")
    elif plan.kv_bytes > left:
        print("  It does not fit: the KV is larger than the memory that is left.")
    elif memory.can_grow(plan):
        print("  It does not fit in the budget. A call would go on with a warning and take what it needs.")
    else:
        print("  It does not fit in the budget. A call would stop with an OutOfBlocksError.")
    print("  Each of these alone:")
    for remedy in remedies(plan, memory):
        verdict = "fits" if remedy.fits else "not enough"
        print(f"    {remedy.change:<32} {size(remedy.plan.kv_bytes):>10}  {verdict}")


def _print_steps(plan: Plan, memory: Memory, config: PagedConfig, device: torch.device) -> None:
    how = f"the default for {device.type}" if config.token_budget is None else "as asked for"
    if memory.is_taken_at_once:
        print(f"\nToken budget: a packed step runs {step_tokens(config, device):,} tokens at most ({how}).")
        return
    budget = memory.budget(plan)
    limits, run, kv = plan.limits(budget), plan.run_bytes(budget), plan.resident_kv_bytes(budget)
    if config.token_budget is None and limits.tokens < step_tokens(config, device):
        how = "all that the budget has room for"
    print(f"\nToken budget: a packed step runs {limits.tokens:,} tokens at most ({how}), of {limits.rows:,} rows.")
    print(
        f"A greedy run takes {size(run)} above the loaded model, and {size(plan.weight_bytes + run)} with it: "
        f"{size(kv)} of blocks, {size(run - kv)} for steps and the process."
    )


def _print_assumptions(plan: Plan) -> None:
    print("\nAssumed: every row stores that many tokens, prompt and answer together, and shares none with another.")
    print("Shorter rows, equal prompts and beams need less in pages; the dense cache pads all rows to the longest.")
    if any(group.window is not None for group in plan.footprint.groups):
        print("A prompt is read in one forward: chunked prefill and assisted decoding keep more of a window.")
    print("A row ends anywhere in its last block: half of that block is empty on average.")
