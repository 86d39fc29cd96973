"""The end of the attention kernels: a result, or a split's share of one. Device code."""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.softmax import add_sink, inverse


@triton.jit
def store_result(
    result, total, maximum, sinks, out, partial_out, partial_lse,
    token, head, num_heads, rows, slot, head_tile, is_query, lanes,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Store what a program's rows ``[BLOCK_M, VALUE_LANES]`` sum up to, divided by `total`.

    One of several splits leaves its share and the logarithm of its total in its slot, in float32. The reduction adds
    the sinks.
    """
    is_out = is_query[:, None] & (lanes < VALUE_DIM)[None, :]
    out_at = out + ((token * num_heads + head)[:, None] * VALUE_DIM + lanes[None, :])
    if IS_SPLIT:
        if slot >= 0:
            partial_row = (slot * tl.num_programs(1) + head_tile).to(tl.int64) * ROWS + rows
            tl.store(partial_lse + partial_row, maximum + tl.log2(total), mask=is_query)
            at = partial_row[:, None] * VALUE_DIM + lanes[None, :]
            tl.store(partial_out + at, result * inverse(total)[:, None], mask=is_out)
        else:
            _store_whole(result, total, maximum, sinks, head, is_query, out_at, is_out, HAS_SINKS)
    else:
        _store_whole(result, total, maximum, sinks, head, is_query, out_at, is_out, HAS_SINKS)


@triton.jit
def _store_whole(result, total, maximum, sinks, head, is_query, out_at, is_out, HAS_SINKS: tl.constexpr):
    """Store what the only split of a context sums up to, with the sinks."""
    if HAS_SINKS:
        factor, maximum, total = add_sink(maximum, total, tl.load(sinks + head, mask=is_query, other=0.0))
        result = result * factor[:, None]
    tl.store(out_at, (result * inverse(total)[:, None]).to(out_at.dtype.element_ty), mask=is_out)
