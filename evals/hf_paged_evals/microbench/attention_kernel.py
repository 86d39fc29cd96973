"""Attention of one layer out of the pages: against reading the KV bytes once, dense SDPA, and gather + SDPA.

Medians in microseconds, contenders interleaved over pools that rotate through memory, so that the caches are cold.
The kernels take turns with streaming reads of the same pools by torch's threads; a read counts as the best of five,
since memory's speed changes from second to second on a shared machine. Then they take turns with gather + SDPA and
dense attention: transformers' own sdpa function, without a mask (as `generate` calls it for rows of one length) and
with one.

In random order, blocks stand as in a pool that has served for long, which costs most. In order, each row's blocks
follow each other in memory, as a fresh pool hands them out to prompts.

Quantised pages take turns with those of the states' own dtype, over pools of the same tokens.
"""

import argparse
import functools
import itertools
import random
import sys
from collections.abc import Callable
from statistics import median

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_paged_evals.microbench.memory_read import load_stream_read
from hf_paged_evals.microbench.turns import take_turns
from hf_paged_evals.runner.options import DTYPES
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_kernels import ops, torch_sdpa
from hf_paged_kernels.quantized import quantize

NAME = "attention_kernel"
QUICK = {"shape": ["9q/3kv/64"], "case": ["8x2048", "32x1024", "prefill"], "repeats": 1}
# Query heads, KV heads, head size.
SHAPES = {"9q/3kv/64": (9, 3, 64), "32q/8kv/128": (32, 8, 128), "4q/1kv/256": (4, 1, 256)}
BLOCK_SIZES = (16, 32, 64, 128)
PREFILL_BLOCK_SIZES = (16, 64)  # Of quantised pages as well.
PREFILL_NEW, PREFILL_PAST = 512, 2048
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _ragged() -> list[int]:
    draw = random.Random(0)
    return [*(draw.randint(50, 2000) for _ in range(31)), 2000]


# Tokens of each row.
CASES = {
    "1x4096": [4096],
    "8x2048": [2048] * 8,
    "32x1024": [1024] * 32,
    "32xragged": _ragged(),
    "8x128": [128] * 8,
    "prefill": [PREFILL_NEW + PREFILL_PAST],
}
ORDERS = {"random": "blocks in random order", "in-order": "blocks in order"}
_CACHE_BYTES = 2**28  # Rotated through between two uses of a pool: several times any cache of a processor.
_READS = 5  # Of these the fastest counts.


class Layer(torch.nn.Module):
    """The attributes of a layer that transformers' sdpa function reads."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.training = groups, True, False


class Pools:
    """Sets of K and V memory, each seen as pages of any block size or as dense tensors.

    Parameters
    ----------
    lengths : list of int
        Tokens of each row.
    shape : (int, int, int)
        Query heads, KV heads, head size.
    is_in_order : bool
        Each row's blocks follow each other in memory.
    """

    def __init__(self, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype, is_in_order: bool):
        self.lengths, (self.num_heads, self.num_kv_heads, self.head_dim) = lengths, shape
        self.dtype, self.is_in_order = dtype, is_in_order
        self.tokens = sum(-(-length // max(BLOCK_SIZES)) * max(BLOCK_SIZES) for length in lengths)
        self.bytes = 2 * self.tokens * self.num_kv_heads * self.head_dim * dtype.itemsize
        self.used_bytes = self.bytes * sum(lengths) // self.tokens
        first = torch.randn(2, self.tokens * self.num_kv_heads * self.head_dim).to(dtype)
        self.sets = [first] + [first.clone() for _ in range(min(15, _CACHE_BYTES // self.bytes) + 1)]
        self._quantized: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    def quantized_pages(self, turn: int, block_size: int, codes: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The turn's set as codes ``[num_blocks, num_kv_heads, block_size, head_dim]`` and scales ``[..., 1]``."""
        if codes not in self._quantized:
            first = quantize(torch.randn(2, self.tokens * self.num_kv_heads, self.head_dim), CODES[codes])
            count = min(15, _CACHE_BYTES // sum(part.nbytes for part in first)) + 2
            self._quantized[codes] = [tuple(part.clone() for part in first) for _ in range(count)]
        parts = self._quantized[codes][turn % len(self._quantized[codes])]
        keys_and_values, scales = (
            [states.view(-1, self.num_kv_heads, block_size, states.shape[-1]) for states in part] for part in parts
        )
        return keys_and_values, scales

    def pages(self, turn: int, block_size: int) -> list[torch.Tensor]:
        """Keys and values ``[num_blocks, num_kv_heads, block_size, head_dim]`` of the turn's set."""
        shape = (-1, self.num_kv_heads, block_size, self.head_dim)
        return [states.view(shape) for states in self.sets[turn % len(self.sets)]]

    def dense(self, turn: int) -> list[torch.Tensor]:
        """Keys and values ``[batch, num_kv_heads, length, head_dim]``, as long as the longest row if rows differ."""
        batch, length = len(self.lengths), max(self.lengths)
        states = self.sets[turn % len(self.sets)]
        if batch * length > self.tokens:  # Padding takes memory of its own.
            states = self.padded[turn % len(self.padded)]
        elements = batch * length * self.num_kv_heads * self.head_dim
        return [each[:elements].view(batch, self.num_kv_heads, length, -1) for each in states]

    @functools.cached_property
    def padded(self) -> list[torch.Tensor]:
        elements = len(self.lengths) * max(self.lengths) * self.num_kv_heads * self.head_dim
        return [torch.randn(2, elements).to(self.dtype) for _ in range(3)]

    def rows(self, block_size: int, num_queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block tables ``[batch, blocks of the longest row]``, context lengths ``[batch]``, cu_seqlens_q."""
        blocks = list(reversed(range(self.tokens // block_size)))
        if not self.is_in_order:
            random.Random(0).shuffle(blocks)
        tables = torch.zeros(len(self.lengths), -(-max(self.lengths) // block_size), dtype=torch.long)
        for row, length in enumerate(self.lengths):
            for index in range(-(-length // block_size)):
                tables[row, index] = blocks.pop()
        return tables, torch.tensor(self.lengths), torch.arange(len(self.lengths) + 1) * num_queries


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=["random"], help="(default: random)")
    parser.add_argument("--codes", nargs="*", choices=CODES, default=list(CODES), help="quantised pages (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of every case, and the ratios between contenders."""
    torch.manual_seed(0)
    stream_read, dtype = load_stream_read(), getattr(torch, given.dtype)
    figures, rows = [], []
    for shape, case, order in itertools.product(given.shape, given.case, given.order):
        pools, name = Pools(CASES[case], SHAPES[shape], dtype, order == "in-order"), f"{case}, {shape}, {ORDERS[order]}"
        if case == "prefill":
            times = prefill(pools, given.codes, given.repeats)
            figures += _prefill_figures(name, times)
        else:
            times = decode(pools, stream_read, given.codes, given.repeats)
            figures += _decode_figures(name, times)
        figures += _quantized_figures(name, times, given.codes)
        rows += [[name, contender, value] for contender, value in times.items()]
    return Section(
        NAME,
        "Attention out of the pages",
        f"Median times of one layer in {given.dtype}, over {len(given.shape)} head shapes.",
        figures,
        [Table("By case", ["Case", "Contender", "Time (us)"], rows)],
        notes=[f"Medians of {given.repeats} interleaved turns. Prefill: {PREFILL_NEW} tokens on {PREFILL_PAST}."],
    )


def decode(
    pools: Pools, stream_read: Callable[[torch.Tensor], int], codes: list[str], repeats: int
) -> dict[str, float]:
    """Median microseconds of a decode step's attention, by contender; of reads, those of the best of five."""
    query = torch.randn(len(pools.lengths), pools.num_heads, pools.head_dim).to(pools.dtype)
    kernels = {f"paged {size}": _paged(ops, pools, query, size) for size in BLOCK_SIZES}
    kernels |= _quantized(pools, query, codes)
    read = {"read": lambda turn: [stream_read(states) for states in pools.sets[turn % len(pools.sets)]]}
    seconds = take_turns({**read, **kernels}, repeats)
    reads = [min(seconds["read"][first : first + _READS]) for first in range(0, repeats, _READS)]
    # A ragged pool is read whole, its last blocks' empty slots included: count the bytes of tokens only.
    floor = median(reads) * pools.used_bytes / pools.bytes
    contenders = {"paged 16 again": kernels["paged 16"], "gather": _paged(torch_sdpa, pools, query, 16)}
    seconds.update(take_turns({**contenders, **_dense(pools, query)}, repeats), read=[floor])
    return {name: 1e6 * median(times) for name, times in seconds.items()}


def prefill(pools: Pools, codes: list[str], repeats: int) -> dict[str, float]:
    """Median microseconds of attending PREFILL_NEW tokens on PREFILL_PAST, by contender."""
    query = torch.randn(PREFILL_NEW, pools.num_heads, pools.head_dim).to(pools.dtype)
    contenders = {
        f"{name} {size}": _paged(backend, pools, query, size)
        for size in PREFILL_BLOCK_SIZES
        for name, backend in (("paged", ops), ("gather", torch_sdpa))
    }
    contenders |= _quantized(pools, query, codes)
    return {name: 1e6 * median(times) for name, times in take_turns(contenders, repeats).items()}


def _paged(backend, pools: Pools, query: torch.Tensor, block_size: int) -> Callable[[int], torch.Tensor]:
    """A call of the backend's paged attention for all rows; `query` ``[tokens, num_heads, head_dim]``."""
    rows = pools.rows(block_size, len(query) // len(pools.lengths))
    scale = pools.head_dim**-0.5
    return lambda turn: backend.paged_attention(query, *pools.pages(turn, block_size), *rows, scale)


def _quantized(pools: Pools, query: torch.Tensor, codes: list[str]) -> dict[str, Callable[[int], torch.Tensor]]:
    """Calls of the kernels for quantised pages."""

    def contender(size: int, name: str) -> Callable[[int], torch.Tensor]:
        rows = pools.rows(size, len(query) // len(pools.lengths))

        def run(turn: int) -> torch.Tensor:
            pages, scales = pools.quantized_pages(turn, size, name)
            return ops.paged_attention(query, *pages, *rows, pools.head_dim**-0.5, None, None, None, *scales)

        return run

    return {f"paged {size} {name}": contender(size, name) for size in PREFILL_BLOCK_SIZES for name in codes}


def _dense(pools: Pools, query: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """Calls of transformers' own attention, with a mask and, for rows of one length, without."""
    layer, longest = Layer(pools.num_heads // pools.num_kv_heads), max(pools.lengths)
    query = query[:, :, None]  # [batch, num_heads, 1, head_dim]
    mask = (torch.arange(longest) < torch.tensor(pools.lengths)[:, None])[:, None, None]  # [batch, 1, 1, longest]
    contenders = {"dense, mask": lambda turn: sdpa_attention_forward(layer, query, *pools.dense(turn), mask)}
    if len(set(pools.lengths)) == 1:
        contenders["dense"] = lambda turn: sdpa_attention_forward(layer, query, *pools.dense(turn), None)
    return contenders


def _decode_figures(name: str, times: dict[str, float]) -> list[Figure]:
    dense = min(times[contender] for contender in ("dense", "dense, mask") if contender in times)
    return [
        *(
            Figure(f"{name}: block {size} over one read", times[f"paged {size}"] / times["read"], "x", better="lower")
            for size in BLOCK_SIZES
        ),
        Figure(f"{name}: better dense over block 16", dense / times["paged 16 again"], "x", better="higher"),
    ]


def _quantized_figures(name: str, times: dict[str, float], codes: list[str]) -> list[Figure]:
    return [
        Figure(
            f"{name}: {kind} over unquantised, block {size}",
            times[f"paged {size} {kind}"] / times[f"paged {size}"],
            "x",
            better="lower",
        )
        for size in PREFILL_BLOCK_SIZES
        for kind in codes
    ]


def _prefill_figures(name: str, times: dict[str, float]) -> list[Figure]:
    return [
        Figure(
            f"{name}: gather over block {size}", times[f"gather {size}"] / times[f"paged {size}"], "x", better="higher"
        )
        for size in PREFILL_BLOCK_SIZES
    ]


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
