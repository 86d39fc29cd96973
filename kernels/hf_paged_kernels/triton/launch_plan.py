"""How a call is cut into programs: tiles, warps, splits and grids. From shapes and the device alone, without Triton.

The host never reads a length: grids are upper bounds, and a program that has nothing to do leaves at once.
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
    """What plans depend on.

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
        """Whether matrix products read their operands from shared memory, of which there is plenty then."""
        return self.arch in ("sm90", "sm100", "sm103")


@dataclass(frozen=True)
class Heads:
    """What a model's layer and its pool fix: the part of a plan that is compiled in.

    Attributes
    ----------
    group : int
        Query heads a KV head.
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
class Launch:
    """One attention kernel over some of a call's queries.

    Attributes
    ----------
    kernel : str
        ``"decode"`` or ``"prefill"``.
    mapping : int
        How a program finds its queries.
    heads, block_q, block_m : int
        Heads and queries a program packs, and the rows of its matrix products.
    min_q : int
        Rows of fewer queries are left to another launch.
    parts, tile : int
        Independent parts of a tile of tokens (0: none), and its tokens.
    warps, stages : int
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


def attention_launches(
    device: Device, heads: Heads, num_tokens: int, num_rows: int, max_context: int
) -> tuple[Launch, ...]:
    """The kernels that together serve every query of a call once.

    Where there are no more queries than rows, each query is served for itself. Else rows of few queries go to
    the decode kernel, and all others to the prefill kernel, whose tiles they share out.
    """
    decode, prefill = decode_launch(device, heads), prefill_launch(device, heads)
    if decode is None:
        launches = [replace(prefill, min_q=0)]
    elif num_tokens <= num_rows:
        launches = [replace(decode, mapping=BY_TOKEN, block_q=1, tiles=num_tokens)]
    elif num_rows == 1:
        launches = [decode if num_tokens <= decode.block_q else prefill]
    else:
        launches = [decode, prefill]
    return tuple(_with_grid(launch, device, heads, num_tokens, num_rows, max_context) for launch in launches)


def _with_grid(launch: Launch, device: Device, heads: Heads, num_tokens, num_rows, max_context) -> Launch:
    if launch.mapping == BY_ROW:
        tiles = num_rows
    elif launch.mapping == BY_TOKEN:
        tiles = num_tokens
    else:
        tiles = (num_tokens + num_rows * (launch.block_q - 1)) // launch.block_q
    programs = tiles * head_tiles(heads, launch)
    room = device.processors * launch.resident // max(programs, 1)
    worth = max_context // max(_MIN_SPLIT_TOKENS, launch.tile)
    return replace(launch, tiles=tiles, splits=max(1, min(room, worth, MAX_SPLITS)))


def head_tiles(heads: Heads, launch: Launch) -> int:
    """Programs that the heads of a token are divided among."""
    return heads.num_kv_heads * -(-heads.group // launch.heads)


def decode_launch(device: Device, heads: Heads) -> Launch | None:
    """The decode kernel for rows of a few queries; None if a group of heads is too large for it."""
    plain = heads.itemsize == 4 and not device.is_hip  # Products without tensor cores: no need to fill 16 rows.
    if heads.group > (16 if plain else 32):
        return None
    block_m = max(4 if plain else 16, 1 << (heads.group - 1).bit_length())
    parts = min(4, 1024 // (heads.lanes * heads.itemsize))  # A tile of keys is 16 KiB at most.
    if block_m > 16:
        parts = min(parts, 2)
    return Launch(
        "decode", BY_ROW, heads.group, max(1, block_m // heads.group), block_m, min_q=0,
        parts=parts, tile=parts * 16, warps=8 if plain and heads.lanes > 64 else 4,
        stages=2 if device.is_hip else 3, resident=2,
    )  # fmt: skip


def prefill_launch(device: Device, heads: Heads) -> Launch:
    """The prefill kernel, for rows of more queries than the decode kernel takes."""
    decode = decode_launch(device, heads)
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
            # and meet twice a tile to take the maximum and the total of each.
            block_m, warps = 128, 8
    # Large heads in three stages are more than the 99 KiB of small GPUs (sm86, sm89, sm120).
    large = heads.lanes > 128 and not plain and not device.is_wide and device.arch != "sm80"
    stages = 2 if device.is_hip or large else 3
    packed = min(heads.group, block_m)
    return Launch(
        "prefill", BY_TILE, packed, block_m // packed, block_m, min_q=decode.block_q + 1 if decode else 0,
        parts=0, tile=tile, warps=warps, stages=stages, resident=1 if block_m > 64 else 2,
    )  # fmt: skip
