"""The rows of the published tables: the words of each, and the figures of the run that measures it.

A cell is a template: ``<NAME>`` stands for the value of the figure of that name in the run's results. In a name, ``*``
stands for any text; if several figures fit, the cell shows the least and the largest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes
    ----------
    what : str
        Its first cell. No other row of the table has the same.
    part : str
        The name of the run that measures it.
    cells : tuple of str
        Templates of the cells that hold results.
    """

    what: str
    part: str
    cells: tuple[str, ...]


def _row(what: str, part: str, *cells: str) -> Row:
    return Row(what, part, cells)


def _blocks_at_end(rows: str) -> str:
    name = f"long prompt, {rows}: blocks at the end"
    return f"<{name}> blocks against <{name}, without sharing>: <{name}, saved> %"


def _decode_step(case: str) -> str:
    return (
        f"<{case}: better dense over paged, block 16> (<{case}: default dense over paged, block 16>), with prepacked "
        f"weights <{case}: better dense over prepacked> (<{case}: default dense over prepacked>)"
    )


_WASTE = "<KV memory without a token, paged, mean> % mean, <KV memory without a token, paged, at most> % at most"
_OVER_ONE_READ = (
    "block 16: <*random order: block 16 over one read>; 64: <*random order: block 64 over one read>; blocks in order: "
    "<*in order: block 16 over one read> and <*in order: block 64 over one read>"
)
_OVER_DENSE = "<*random order: better dense over block 16> times faster, in order <*in order: better dense*>"
_OVER_GATHER = "<prefill*random order: gather over block *> times faster"
_THROUGHPUT = (
    "<ragged: paged, batch 32> tokens/s, with prepacked weights <ragged: paged, prepacked, batch 32>; dense "
    "<ragged: dense, batch 32> in one batch of 32, <ragged: dense, batch 8> in batches of 8; `generate_batch` "
    "<ragged: generate_batch>; <ragged: answers of paged as of dense> of 32 rows equal dense"
)
_SHORT_PROMPT = "<paged over dense, speed> times dense's speed"
_THREADS = (
    "<at once over one after another, speed> times faster (<at once over dense, speed> times dense); "
    "<rows equal to dense: paged, all at once> of 8 rows equal dense"
)

# README.md: paged, dense.
README = (
    _row(
        "`generate` over 32 ShareGPT prompts, 128 new tokens",
        "throughput-bfloat16",
        "<ragged: paged, batch 32> tokens/s",
        "<ragged: dense, batch 32> in one batch of 32, <ragged: dense, batch 8> in batches of 8; `generate_batch` "
        "<ragged: generate_batch>",
    ),
    _row(
        "pipeline over 64 ShareGPT prompts, default arguments, 64 new tokens",
        "pipeline-bfloat16",
        "<paged> s",
        "<stock, default arguments> s; <stock, batch_size=8> s with `batch_size=8`",
    ),
    _row(
        "16 requests that share 1,024 tokens, 32 new tokens",
        "prefix-bfloat16",
        "<all requests: with prefix cache> s",
        "<all requests: dense> s",
    ),
    _row(
        "peak memory above the model, 8 x 2,048 tokens, float32, two runs",
        "memory-float32",
        "<long: paged> MiB",
        "<long: dense> MiB",
    ),
    _row(
        "one prompt of 32 tokens, 64 new ones: speed over dense",
        "short-prompt-bfloat16",
        "<paged over dense, speed>",
        "1",
    ),
)

# docs/benchmarks.md, speed and memory.
BENCHMARKS = (
    _row("blocks saved by sharing, `num_beams=4`, 512 + 64 tokens", "blocks-16", _blocks_at_end("4 beams")),
    _row(
        "blocks saved by sharing, `num_return_sequences=8`, 512 + 64 tokens", "blocks-16", _blocks_at_end("8 samples")
    ),
    _row("waste, 32 ShareGPT prompts (80 tokens on average), block 16", "blocks-16", _WASTE),
    _row("waste, the same prompts, block 32", "blocks-32", _WASTE),
    _row("padding in the dense rectangle of these prompts", "blocks-16", "<padding in the rectangle of the prompts> %"),
    _row(
        "decode attention, bfloat16, 8 x 2,048 and 32 x 1,024 tokens, three head shapes: time over reading the KV "
        "bytes once",
        "attention-bfloat16",
        _OVER_ONE_READ,
    ),
    _row("decode attention, bfloat16, against the better of two dense layouts", "attention-bfloat16", _OVER_DENSE),
    _row(
        "decode attention, float32, over reading once; against dense",
        "attention-float32",
        f"{_OVER_ONE_READ}; {_OVER_DENSE}",
    ),
    _row(
        "prefill of 512 tokens on 2,048 past, bfloat16, against gather + SDPA",
        "attention-bfloat16",
        _OVER_GATHER,
    ),
    _row(
        "prefill of 512 tokens on 2,048 past, float32, against gather + SDPA",
        "attention-float32",
        _OVER_GATHER,
    ),
    _row(
        "whole decode step, bfloat16, 32 x 1,024, against the better dense one (against the default)",
        "decode-step-bfloat16",
        _decode_step("32x1024"),
    ),
    _row("whole decode step, float32, 32 x 1,024", "decode-step-float32", _decode_step("32x1024")),
    _row("whole decode step, bfloat16, 8 x 128", "decode-step-bfloat16", _decode_step("8x128")),
    _row("whole decode step, float32, 8 x 128", "decode-step-float32", _decode_step("8x128")),
    _row("`generate` over 32 ShareGPT prompts, 128 new tokens, bfloat16", "throughput-bfloat16", _THROUGHPUT),
    _row("`generate` over 32 ShareGPT prompts, 128 new tokens, float32", "throughput-float32", _THROUGHPUT),
    _row("one prompt of 32 tokens, 64 new ones, bfloat16", "short-prompt-bfloat16", _SHORT_PROMPT),
    _row("one prompt of 32 tokens, 64 new ones, float32", "short-prompt-float32", _SHORT_PROMPT),
    _row(
        "peak memory of `generate` above the model, 8 x 2,048 tokens of which 64 are new, float32",
        "memory-float32",
        "paged <long: paged> MiB, dense <long: dense>: <long: paged of dense> %; medians of two runs",
    ),
    _row(
        "16 requests that share 1,024 tokens, 32 new ones, bfloat16",
        "prefix-bfloat16",
        "<all requests: with prefix cache> s; without prefix cache <all requests: without prefix cache> s, dense "
        "<all requests: dense> s; first token of a second call after <first token: second call> s, of the first after "
        "<first token: first call> s",
    ),
    _row("8 threads at once, against one after another, bfloat16", "threads-bfloat16", _THREADS),
    _row("8 threads at once, against one after another, float32", "threads-float32", _THREADS),
    _row(
        "a pipeline over 64 ShareGPT prompts, default arguments, 64 new tokens, bfloat16",
        "pipeline-bfloat16",
        "<paged> s; stock <stock, default arguments> s, with `batch_size=8` <stock, batch_size=8> s, with 16 "
        "<stock, batch_size=16> s, with 32 <stock, batch_size=32> s; first result when "
        "<paged, prompts read at the first result> of 64 prompts were read",
    ),
    _row(
        "16 asyncio streams at once (one alone), bfloat16",
        "async-bfloat16",
        "first token after <all at once: first token, median> ms (<one at a time: first token, median>), p99 "
        "<all at once: first token, p99> (<one at a time: first token, p99>); between tokens "
        "<all at once: between tokens, median> ms (<one at a time: between tokens, median>), p99 "
        "<all at once: between tokens, p99> (<one at a time: between tokens, p99>)",
    ),
    _row(
        "scheduling, packing and noting a decode step",
        "scheduler",
        "64 rows <64 rows: all> ms, 256 rows <256 rows: all> ms, 1,024 rows <1024 rows: all> ms",
    ),
    _row(
        "seeing that SmolLM2 is still the same, in turns with decode steps of one row in float32",
        "identity-float32",
        "once per call <1 rows: per call> ms, <1 rows: per call, of a step> % of a step; after each step "
        "<1 rows: per step> ms, <1 rows: per step, of a step> %",
    ),
    _row(
        "`import torch` with the entry point",
        "autoload",
        "<the entry point alone> ms of <import torch, with the entry point> ms",
    ),
    _row(
        "decode loop of the Triton kernel, head 128, GQA 4, sm80 and sm90: instructions per KV token and head",
        "triton",
        "<decode loop, sm[89]0: instructions>, <decode loop, sm[89]0: tiles in flight> tiles in flight; compiled, not "
        "run. <kernels that miss a threshold> of all <kernels compiled> kernels for four targets miss a threshold, "
        "<kernels that spill> spill",
    ),
)

# docs/benchmarks.md, accuracy: parts of which every figure has a row.
WHOLE_RUNS = ("accuracy-bfloat16", "accuracy-float32", "needle-float32", "paper-bfloat16")
# docs/models.md: the part whose first table is shown.
MODEL_TYPES = "model-types"
