"""The calls of the ops that the stages make: known beforehand, so that all of them can be compiled beforehand."""

import dataclasses
import itertools

import torch

from hf_paged_evals.gpu.pages import Heads, OpCase, OpOptions, Rows

LLAMA_8B, LLAMA_1B = Heads(32, 8, 128), Heads(32, 8, 64)
HEADS = (LLAMA_8B, Heads(9, 3, 64), Heads(8, 8, 80), Heads(16, 8, 256), Heads(12, 2, 96))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)
PLAIN, ALL_OPTIONS = OpOptions(), OpOptions(window=100, softcap=20.0, has_sinks=True)
# Rows of the accuracy checks: one token a row, a mixed step, a single row, and a long prompt on a past.
CHECKED_ROWS: tuple[Rows, ...] = (
    ((1, 1), (16, 1), (17, 1), (700, 1), (4000, 1)),
    ((40, 9), (33, 33), (31, 1), (1500, 1), (650, 600)),
    ((4000, 1),),
    ((600, 512),),
)
_DRY_ROWS: tuple[Rows, ...] = (((1, 1), (16, 1), (17, 1)), ((40, 9), (31, 1)))
# Rows and context of timed decode steps. The first two are those of the bars.
DECODE = ((32, 1024), (64, 4096), (8, 2048), (32, 2048), (256, 1024), (1, 16384))
# Rows, queries and context of timed prefills. The first is that of the bar.
PREFILL = ((1, 8192, 8192), (1, 2048, 2048), (4, 2048, 2048), (16, 512, 512), (1, 512, 16384), (31, 16, 2048))
# A bucket of a captured step, its real rows, and the blocks of a row's table.
PADDED_BUCKET, PADDED_WIDTH = 8, 128
PADDED_ROWS: tuple[Rows, ...] = (((33, 1), (5, 1), (900, 1)), ((2000, 1), (16, 1), (17, 1), (1, 1), (640, 1)))
RAGGED: tuple[Rows, ...] = (
    ((16000, 1), *(((300, 1),) * 31)),
    tuple((int(200 * 1.12**row), 1) for row in range(32)),
)


def accuracy_cases(is_dry: bool) -> list[OpCase]:
    """Every dtype, head size and option over all kinds of rows, and every block size for the heads that matter most."""
    rows, heads = (_DRY_ROWS, HEADS[1:3]) if is_dry else (CHECKED_ROWS, HEADS)
    cases = [
        OpCase(some, shape, dtype, 16, options)
        for dtype, shape, some, options in itertools.product(DTYPES, heads, rows, (PLAIN, ALL_OPTIONS))
    ]
    cases += [OpCase(some, heads[0], dtype, size) for dtype in DTYPES for some in rows for size in (32, 64)]
    quantised = itertools.product(CODES, rows, ((heads[0], PLAIN), (heads[1], ALL_OPTIONS)))
    cases += [OpCase(some, shape, options=options, codes=codes) for codes, some, (shape, options) in quantised]
    return cases + [OpCase(rows[1], heads[1], dtype, codes=codes) for codes in CODES for dtype in DTYPES[:2]]


def decode_cases(is_dry: bool) -> list[OpCase]:
    """Timed decode steps: every size for the heads of the bars, the first for other heads, blocks and dtypes."""
    if is_dry:
        return [decode_case(2, 64, HEADS[1]), decode_case(2, 64, HEADS[1], codes=CODES[0])]
    cases = [decode_case(rows, context) for rows, context in DECODE]
    cases += [decode_case(*DECODE[0], heads=heads) for heads in (LLAMA_1B, HEADS[1], HEADS[3])]
    cases += [decode_case(*size, block_size=block) for size in DECODE[:2] for block in (32, 64)]
    cases += [decode_case(*size, codes=codes) for size in DECODE[:2] for codes in CODES]
    return [*cases, decode_case(*DECODE[0], dtype=torch.float16), *(OpCase(rows, LLAMA_8B) for rows in RAGGED)]


def decode_case(
    rows: int,
    context: int,
    heads: Heads = LLAMA_8B,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    codes: torch.dtype | None = None,
) -> OpCase:
    """A decode step of rows of one length."""
    return OpCase(((context, 1),) * rows, heads, dtype, block_size, codes=codes)


def prefill_cases(is_dry: bool) -> list[OpCase]:
    """Timed prefills, bfloat16."""
    sizes = ((1, 64, 64),) if is_dry else PREFILL
    heads = (HEADS[1],) if is_dry else (LLAMA_8B, LLAMA_1B)
    cases = [OpCase(((context, queries),) * rows, shape) for shape in heads for rows, queries, context in sizes]
    return cases + [dataclasses.replace(case, codes=codes) for case in cases[: 1 if is_dry else 3] for codes in CODES]


def model_cases() -> list[OpCase]:
    """Steps of the models of the later stages: decode at the lengths that they come through, and their prompts."""
    cases = []
    for heads in (LLAMA_8B, LLAMA_1B):
        for rows in (1, 2, 32, 128):
            cases += [decode_case(rows, context, heads) for context in (40, 64, 520, 640, 2048, 2100)]
            cases += [OpCase(((context, max(2, 4096 // rows)),) * rows, heads) for context in (4096, 8192)]
    return cases
