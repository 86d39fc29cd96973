"""Plans: how a call of an op is cut into the programs of kernels, by tiles, warps and splits. Imports no Triton.

A plan comes from shapes and the device alone. The host never reads a length: numbers of programs are upper bounds, and
a program that has nothing to do leaves at once. `kernel_calls` makes kernels with arguments out of plans.
"""

import functools
from dataclasses import dataclass, replace

import torch

BY_TOKEN, BY_ROW, BY_TILE = 0, 1, 2  # How programs find their queries: see rows.py.
MAX_DIM = {2: 512, 4: 256}  # Largest head size, by bytes of an element: larger ones do not fit in shared memory.
MAX_SPLITS = 128


@dataclass(frozen=True)
class Device:
    """The part of a GPU that plans depend on.

    Attributes
    ----------
    arch : str
        ``"sm80"``, ``"gfx942"`` and so on.
    processors : int
        Streaming multiprocessors or compute units.
    min_split_tokens : int
        A split of fewer tokens costs more in the reduction than it gains.
    """

    arch: str
    processors: int
    min_split_tokens: int = 256

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
        Bytes of an element of queries.
    rope_dim : int
        Where keys and values are one latent, the size of its rope part; 0: they are not.
    is_quantized : bool
        Pages hold codes.
    """

    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    block_size: int
    itemsize: int
    rope_dim: int = 0
    is_quantized: bool = False

    @property
    def lanes(self) -> int:
        return max(padded(self.key_dim), padded(self.value_dim))


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention kernel serves some of a call's queries.

    Attributes
    ----------
    kernel : str
        ``"decode"``, ``"prefill"`` or ``"latent"``.
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
    extra : int
        Programs beyond one for each tile, among which the device deals out the splits of long contexts.
    min_tiles : int
        Tiles of tokens that a split has at least.
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
    extra: int = 0
    min_tiles: int = 1


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


@functools.lru_cache(maxsize=256)  # All layers of a step ask for the same few.
def attention_plans(
    device: Device, heads: Heads, num_tokens: int, num_rows: int, max_context: int, window: int | None = None
) -> tuple[AttentionPlan, ...]:
    """The plans that together serve every query of a call once.

    Where there are no more queries than rows, each query is served for itself. Else rows of few queries go to
    the decode kernel, and all others to the prefill kernel, whose tiles they share out.
    """
    single, few, many = _kernel_plans(device, heads)
    if single is None or few is None:
        chosen = [many]
    elif num_tokens <= num_rows:
        chosen = [single]
    elif num_rows == 1:
        chosen = [few if num_tokens <= few.block_q else many]
    else:
        chosen = [few, many]
    plans = [replace(plan, tiles=_query_tiles(plan, num_tokens, num_rows)) for plan in chosen]
    return tuple(replace(plan, extra=_extra(plan, device, heads, max_context, window)) for plan in plans)


def possible_plans(device: Device, heads: Heads, window: int | None = None) -> tuple[AttentionPlan, ...]:
    """All that `attention_plans` can choose for any step, but for the numbers of programs; `extra` is 0 or 1.

    Returns
    -------
    tuple of AttentionPlan
        Each stands for one compiled kernel, or for two if it has extra programs, whose splits are reduced.
    """
    plans = [plan for plan in _kernel_plans(device, heads) if plan is not None]
    longest = 1 << 31  # Longer than any context; what a window hides is taken off.
    splits = {plan: _extra(replace(plan, tiles=1), device, heads, longest, window) > 0 for plan in plans}
    return tuple(replace(plan, extra=extra) for plan in plans for extra in range(2) if splits[plan] or not extra)


def _kernel_plans(device: Device, heads: Heads) -> tuple[AttentionPlan | None, AttentionPlan | None, AttentionPlan]:
    """The plans for single queries, for rows of few and for rows of many; the last for all if the others are None."""
    few: AttentionPlan | None
    if heads.rope_dim:
        few, many = latent_plans(device, heads)
    else:
        few, many = decode_plan(device, heads), prefill_plan(device, heads)
    many = replace(many, min_tiles=max(1, device.min_split_tokens // many.tile))
    if few is None:
        return None, None, replace(many, min_q=0)
    few = replace(few, min_tiles=max(1, device.min_split_tokens // few.tile))
    return replace(few, mapping=BY_TOKEN, block_q=1), few, many


def _query_tiles(plan: AttentionPlan, num_tokens: int, num_rows: int) -> int:
    if plan.mapping == BY_ROW:
        return num_rows
    if plan.mapping == BY_TOKEN:
        return num_tokens
    return (num_tokens + num_rows * (plan.block_q - 1)) // plan.block_q


def _extra(plan: AttentionPlan, device: Device, heads: Heads, max_context: int, window: int | None) -> int:
    """Extra programs of a tile of heads: those that fill the device, and enough that no long row runs on behind it.

    With one for each tile, or for each program that the device runs at once, no split is longer than the share of all
    work that falls to such a program, and rows of one length stay whole.
    """
    seen = max_context if window is None else min(max_context, window + plan.block_q + plan.tile)
    most = min(-(-seen // (plan.tile * plan.min_tiles)), MAX_SPLITS)
    if most <= 1:
        return 0
    at_once = max(1, device.processors * plan.resident // head_tiles(heads, plan))
    return min(max(at_once - plan.tiles, min(plan.tiles - 1, at_once), 1), plan.tiles * most)


def head_tiles(heads: Heads, plan: AttentionPlan) -> int:
    """Number of programs that the heads of a token are divided among."""
    return heads.num_kv_heads * -(-heads.group // plan.heads)


def decode_plan(device: Device, heads: Heads) -> AttentionPlan | None:
    """The decode kernel for rows of a few queries; None if heads or a group of them are too large for it."""
    if heads.lanes > 256:  # A warp would hold its queries in more registers than there are.
        return None
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
    if heads.lanes > 256:
        block_m, tile, warps = 32, 32 if device.is_wide else 16, 8
    elif plain:
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
    if heads.is_quantized and device.is_wide and heads.itemsize == 2 and 64 < heads.lanes <= 256:
        # Codes become numbers once for all warps, which then read these from shared memory: more rows share the work.
        block_m, tile, warps = 128, 32, 8
    # Large heads in three stages are more than the 99 KiB of small GPUs (sm86, sm89, sm120).
    large = heads.lanes > 128 and not plain and not device.is_wide and device.arch != "sm80"
    stages = 2 if device.is_hip or large else 3
    packed = min(heads.group, block_m)
    return AttentionPlan(
        "prefill", BY_TILE, packed, block_m // packed, block_m, min_q=decode.block_q + 1 if decode else 0,
        parts=0, tile=tile, warps=warps, stages=stages, resident=1 if block_m > 64 else 2,
    )  # fmt: skip


def latent_plans(device: Device, heads: Heads) -> tuple[AttentionPlan, AttentionPlan]:
    """The latent kernel for rows of few queries, and for rows of more.

    A program holds the sums of all its rows, each as long as a latent: 16 rows fill half the registers of 4 warps.
    """
    plain = heads.itemsize == 4 and not device.is_hip
    is_large = heads.lanes * heads.itemsize > 512
    # Large latents in three stages are more than the 99 KiB of small GPUs (sm86, sm89, sm120).
    has_room = device.is_wide or device.arch == "sm80" or not is_large
    stages = 3 if has_room and not device.is_hip else 2

    def plan(mapping: int, block_m: int, warps: int, resident: int, min_q: int) -> AttentionPlan:
        packed = min(heads.group, block_m)
        return AttentionPlan(
            "latent", mapping, packed, block_m // packed, block_m, min_q,
            parts=0, tile=16 if plain else 32, warps=warps, stages=stages, resident=resident,
        )  # fmt: skip

    # 16 rows spill a few bytes on sm100, 32 rows many on CDNA.
    if heads.lanes > 256 and device.arch in ("sm100", "sm103"):
        few = plan(BY_ROW, 32, 8, 1, min_q=0)
    else:
        few = plan(BY_ROW, 16, 8 if plain else 4, 2 if device.is_wide or not is_large else 1, min_q=0)
    many = (16, 4) if device.is_hip else (16 if plain else 32, 8)
    return few, plan(BY_TILE, *many, 1, min_q=few.block_q + 1)
