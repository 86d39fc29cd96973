"""Attention of one layer out of the pages: against reading the KV bytes once, dense SDPA, and gather + SDPA.

    python evals/bench_kernels.py [--dtype bfloat16] [--shape 9q/3kv/64] [--case 8x2048] [--repeats 15] [--in-order]

Medians in microseconds, contenders interleaved over pools that rotate through memory, so that the caches are cold.
The kernels take turns with streaming reads of the same pools by torch's threads; a read counts as the best of five,
since memory's speed changes from second to second on a shared machine. Then they take turns with gather + SDPA and
dense attention: transformers' own sdpa function, without a mask (what `generate` does for rows of one length) and
with one.

Blocks stand in random order, as in a pool that has served for long, which costs most. With --in-order each row's
blocks follow each other in memory, as a fresh pool hands them out to prompts.
"""

import argparse
import itertools
import random

import torch
from interleave import load_stream_read, machine, median, take_turns
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_paged_kernels import ops, torch_sdpa

SHAPES = {"9q/3kv/64": (9, 3, 64), "32q/8kv/128": (32, 8, 128), "4q/1kv/256": (4, 1, 256)}
CASES = {"1x4096": [4096], "8x2048": [2048] * 8, "32x1024": [1024] * 32, "32xragged": None, "8x128": [128] * 8}
BLOCK_SIZES = (16, 32, 64, 128)
PREFILL_NEW, PREFILL_PAST = 512, 2048
CACHE_BYTES = 2**28  # Rotated through between two uses of a pool: several times any cache.


class Module(torch.nn.Module):
    """What transformers' sdpa function asks of a layer."""

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.training = groups, True, False


class Pools:
    """Sets of K and V memory, each seen as pages of any block size or as dense tensors."""

    def __init__(self, lengths, shape, dtype, in_order=False):
        self.in_order = in_order
        self.lengths, (self.num_heads, self.num_kv_heads, self.head_dim) = lengths, shape
        self.tokens = sum(-(-length // 128) * 128 for length in lengths)
        self.bytes = 2 * self.tokens * self.num_kv_heads * self.head_dim * dtype.itemsize
        self.used_bytes = self.bytes * sum(lengths) // self.tokens
        first = torch.randn(2, self.tokens * self.num_kv_heads * self.head_dim).to(dtype)
        self.sets = [first] + [first.clone() for _ in range(min(15, CACHE_BYTES // self.bytes) + 1)]

    def pages(self, turn, block_size):
        shape = (-1, self.num_kv_heads, block_size, self.head_dim)
        return [states.view(shape) for states in self.sets[turn % len(self.sets)]]

    def dense(self, turn):
        """[batch, num_kv_heads, length, head_dim], as long as the longest row is if rows differ."""
        batch, length = len(self.lengths), max(self.lengths)
        states = self.sets[turn % len(self.sets)]
        if batch * length > self.tokens:  # Padding takes memory of its own.
            states = self.padded[turn % len(self.padded)]
        return [
            x[: batch * length * self.num_kv_heads * self.head_dim].view(batch, self.num_kv_heads, length, -1)
            for x in states
        ]

    @property
    def padded(self):
        if not hasattr(self, "_padded"):
            count = len(self.lengths) * max(self.lengths) * self.num_kv_heads * self.head_dim
            self._padded = [torch.randn(2, count).to(self.sets[0].dtype) for _ in range(3)]
        return self._padded

    def rows(self, block_size, num_queries):
        """Block tables, context lengths and counts of queries."""
        blocks = list(reversed(range(self.tokens // block_size)))
        if not self.in_order:
            random.Random(0).shuffle(blocks)
        tables = torch.zeros(len(self.lengths), -(-max(self.lengths) // block_size), dtype=torch.long)
        for row, length in enumerate(self.lengths):
            for index in range(-(-length // block_size)):
                tables[row, index] = blocks.pop()
        return tables, torch.tensor(self.lengths), torch.arange(len(self.lengths) + 1) * num_queries


def decode(pools, stream_read, repeats):
    """Medians of a decode step's attention, by contender; of reads, those of the best of five."""
    batch, dtype = len(pools.lengths), pools.sets[0].dtype
    query, scale = torch.randn(batch, pools.num_heads, pools.head_dim).to(dtype), pools.head_dim**-0.5
    module, longest = Module(pools.num_heads // pools.num_kv_heads), max(pools.lengths)
    mask = (torch.arange(longest) < torch.tensor(pools.lengths)[:, None])[:, None, None]
    dense_query = query[:, :, None]
    kernels = {}
    for size in BLOCK_SIZES:
        rows = pools.rows(size, 1)
        kernels[f"paged {size}"] = lambda turn, size=size, rows=rows: ops.paged_attention(
            query, *pools.pages(turn, size), *rows, scale
        )
    read = {"read": lambda turn: [stream_read(x) for x in pools.sets[turn % len(pools.sets)]]}
    seconds = take_turns({**read, **kernels}, repeats)
    reads = [min(seconds["read"][first : first + 5]) for first in range(0, repeats, 5)]
    # A ragged pool is read whole, its last blocks' empty slots included: count the bytes of tokens only.
    floor = median(reads) * pools.used_bytes / pools.bytes
    rows = pools.rows(16, 1)
    contenders = {"paged 16 again": kernels["paged 16"]}
    contenders["gather"] = lambda turn: torch_sdpa.paged_attention(query, *pools.pages(turn, 16), *rows, scale)
    if len(set(pools.lengths)) == 1:
        contenders["dense"] = lambda turn: sdpa_attention_forward(module, dense_query, *pools.dense(turn), None)
    contenders["dense+mask"] = lambda turn: sdpa_attention_forward(module, dense_query, *pools.dense(turn), mask)
    seconds.update(take_turns(contenders, repeats), read=[floor])
    return {name: median(times) * 1e6 for name, times in seconds.items()}


def prefill(pools, repeats):
    """Medians of attending PREFILL_NEW tokens on PREFILL_PAST, by contender."""
    query = torch.randn(PREFILL_NEW, pools.num_heads, pools.head_dim).to(pools.sets[0].dtype)
    contenders = {}
    for size in (16, 64):
        rows = pools.rows(size, PREFILL_NEW)
        for name, module in (("paged", ops), ("gather", torch_sdpa)):
            contenders[f"{name} {size}"] = lambda turn, size=size, rows=rows, module=module: module.paged_attention(
                query, *pools.pages(turn, size), *rows, pools.head_dim**-0.5
            )
    return {name: median(times) * 1e6 for name, times in take_turns(contenders, repeats).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--case", action="append", choices=[*CASES, "prefill"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--in-order", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    CASES["32xragged"] = [random.Random(0).randint(50, 2000) for _ in range(31)] + [2000]
    stream_read = load_stream_read()
    print(machine())
    grid = itertools.product(arguments.dtype or ["bfloat16", "float32"], arguments.shape or SHAPES)
    for dtype, shape in grid:
        for case in arguments.case or [*CASES, "prefill"]:
            lengths = [PREFILL_NEW + PREFILL_PAST] if case == "prefill" else CASES[case]
            pools = Pools(lengths, SHAPES[shape], getattr(torch, dtype), arguments.in_order)
            if case == "prefill":
                medians = prefill(pools, arguments.repeats)
                note = " ".join(f"x{medians[f'gather {size}'] / medians[f'paged {size}']:.2f}" for size in (16, 64))
                note = f"gather / paged: {note}"
            else:
                medians = decode(pools, stream_read, arguments.repeats)
                ratios = " ".join(f"{medians[f'paged {size}'] / medians['read']:.2f}" for size in BLOCK_SIZES)
                best = min(medians[name] for name in ("dense", "dense+mask") if name in medians)
                note = f"paged / read: {ratios}  best dense / paged 16: x{best / medians['paged 16 again']:.2f}"
            print(
                f"{dtype:8} {shape:11} {case:9} "
                + " ".join(f"{k} {v:.0f}" for k, v in medians.items())
                + f"  | {note}",
                flush=True,
            )


if __name__ == "__main__":
    main()
