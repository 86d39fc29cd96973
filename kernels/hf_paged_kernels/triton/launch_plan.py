"""Plans: how a call of an op is cut into the programs of kernels, by tiles, warps and splits. Imports no Triton.

A plan comes from shapes and the device alone. The host never reads a length: numbers of programs are upper bounds, and
a program that has nothing to do leaves at once. `kernel_calls` makes kernels with arguments out of plans.
"""

import functools
from dataclasses import dataclass, replace

import torch

BY_TOKEN, BY_ROW, BY_TILE = 0, 1, 2  # How programs find their queries: see rows.py.
MAX_DIM = 256
MAX_SPLITS = 128
_MIN_SPLIT_TOKENS = 256  # A split of fewer tokens costs more in the reduction than it gains.


@dataclass(frozen=True)
class Device:
    """The part of a GPU that plans depend on.

    Attributes
    ----------
    arch : str
        ``"sm80"``, ``"gfx942"`` and so on.
    processors : int
        Streaming multiprocessors or compute units.
    """

    arch: str
    processors: int

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def is_wide(self) -> bool:
        """Tell whether matrix products read their operands from shared memory, of which there is plenty then."""
        return self.arch in ("sm90", "sm100", "sm103")


@dataclass(frozen=True)
class Heads:
    """Sizes of a model's layer and of its pages: the part of a plan that is compiled in.

    Attributes
    ----------
    group : int
        Query heads per KV head.
    itemsize : int
        Bytes of an element.
    """

    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    block_size: int
    itemsize: int

    @property
    def lanes(self) -> int:
        return max(padded(self.key_dim), padded(self.value_dim))


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention kernel serves some of a call's queries.

    Attributes
    ----------
    kernel : str
        ``"decode"`` or ``"prefill"``.
    mapping : int
        How a program finds its queries: `BY_TOKEN`, `BY_ROW` or `BY_TILE`.
    heads, block_q, block_m : int
        Heads and queries a program packs, and the rows of its matrix products.
    min_q : int
        Rows of fewer queries are left to another plan.
    parts, tile : int
        Independent parts of a tile of tokens (0: none), and its tokens.
    warps, stages : int
        Warps of a program, and tiles of tokens that its loop has under way.
    resident : int
        Programs that fit on a processor at once.
    tiles : int
        Upper bound on the tiles of queries.
    splits : int
        Programs that share one context.
    """

    kernel: str
    mapping: int
    heads: int
    block_q: int
    block_m: int
    min_q: int
    parts: int
    tile: int
    warps: int
    stages: int
    resident: int = 1
    tiles: int = 0
    splits: int = 1


@functools.cache
def describe(device: torch.device) -> Device:
    """The device of a tensor; on the CPU, where Triton's interpreter runs, a small made-up one."""
    if device.type == "cpu":
        return Device("sm80", 4)
    about = torch.cuda.get_device_properties(device)
    arch = about.gcnArchName.split(":")[0] if torch.version.hip else f"sm{about.major}{about.minor}"
    return Device(arch, about.multi_processor_count)


def padded(size: int) -> int:
    """The power of two that holds `size` lanes, at least 16: the least that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def attention_plans(
    device: Device, heads: Heads, num_tokens: int, num_rows: int, max_context: int
) -> tuple[AttentionPlan, ...]:
    """The plans that together serve every query of a call once.

    Where there are no more queries than rows, each query is served for itself. Else rows of few queries go to
    the decode kernel, and all others to the prefill kernel, whose tiles they share out.
    """
    decode, prefill = decode_plan(device, heads), prefill_plan(device, heads)
    if decode is None:
        plans = [replace(prefill, min_q=0)]
    elif num_tokens <= num_rows:
        plans = [replace(decode, mapping=BY_TOKEN, block_q=1, tiles=num_tokens)]
    elif num_rows == 1:
        plans = [decode if num_tokens <= decode.block_q else prefill]
    else:
        plans = [decode, prefill]
    return tuple(_with_grid(plan, device, heads, num_tokens, num_rows, max_context) for plan in plans)


def _with_grid(plan: AttentionPlan, device: Device, heads: Heads, num_tokens, num_rows, max_context) -> AttentionPlan:
    if plan.mapping == BY_ROW:
        tiles = num_rows
    elif plan.mapping == BY_TOKEN:
        tiles = num_tokens
    else:
        tiles = (num_tokens + num_rows * (plan.block_q - 1)) // plan.block_q
    programs = tiles * head_tiles(heads, plan)
    room = device.processors * plan.resident // max(programs, 1)
    worth = max_context // max(_MIN_SPLIT_TOKENS, plan.tile)
    return replace(plan, tiles=tiles, splits=max(1, min(room, worth, MAX_SPLITS)))


def head_tiles(heads: Heads, plan: AttentionPlan) -> int:
    """Number of programs that the heads of a token are divided among."""
    return heads.num_kv_heads * -(-heads.group // plan.heads)


def decode_plan(device: Device, heads: Heads) -> AttentionPlan | None:
    """The decode kernel for rows of a few queries; None if a group of heads is too large for it."""
    plain = heads.itemsize == 4 and not device.is_hip  # Products without tensor cores: no need to fill 16 rows.
    if heads.group > (16 if plain else 32):
        return None
    block_m = max(4 if plain else 16, 1 << (heads.group - 1).bit_length())
    parts = min(4, 1024 // (heads.lanes * heads.itemsize))  # A tile of keys is 16 KiB at most.
    if block_m > 16:
        parts = min(parts, 2)
    return AttentionPlan(
        "decode", BY_ROW, heads.group, max(1, block_m // heads.group), block_m, min_q=0,
        parts=parts, tile=parts * 16, warps=8 if plain and heads.lanes > 64 else 4,
        stages=2 if device.is_hip else 3, resident=2,
    )  # fmt: skip


def prefill_plan(device: Device, heads: Heads) -> AttentionPlan:
    """The prefill kernel, for rows of more queries than the decode kernel takes."""
    decode = decode_plan(device, heads)
    plain = heads.itemsize == 4 and not device.is_hip
    # What fits in registers, found by compiling: `hf-paged eval triton` shows what spills and what does not.
    block_m, tile, warps = 64, 64, 4
    if plain:
        block_m, tile, warps = 16, 16, 4 if heads.lanes <= 64 else 8
    elif heads.itemsize == 4:
        block_m, tile = 32, 32 if heads.lanes <= 128 else 16
    elif heads.lanes > 128:
        tile, warps = 32, 8
    elif not device.is_wide and not device.is_hip:
        tile = 32
        if heads.lanes > 64:
            # Triton gives each warp rows of its own if there are as many rows as lanes. Else all warps share all rows,
            # and meet twice per tile to take the maximum and the total of each.
            block_m, warps = 128, 8
    # Large heads in three stages are more than the 99 KiB of small GPUs (sm86, sm89, sm120).
    large = heads.lanes > 128 and not plain and not device.is_wide and device.arch != "sm80"
    stages = 2 if device.is_hip or large else 3
    packed = min(heads.group, block_m)
    return AttentionPlan(
        "prefill", BY_TILE, packed, block_m // packed, block_m, min_q=decode.block_q + 1 if decode else 0,
        parts=0, tile=tile, warps=warps, stages=stages, resident=1 if block_m > 64 else 2,
    )  # fmt: skip
