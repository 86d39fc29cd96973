"""Whole blocks to other places (copy-on-write)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["source", "destination"])
def copy_kernel(
    key_cache, value_cache, source, destination, key_stride, value_stride,
    KEY_ELEMENTS: tl.constexpr, VALUE_ELEMENTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per copy and chunk of the block, in both caches."""
    number = tl.program_id(0)
    from_block = tl.load(source + number).to(tl.int64)
    to_block = tl.load(destination + number).to(tl.int64)
    inside = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    states = tl.load(key_cache + from_block * key_stride + inside, mask=inside < KEY_ELEMENTS)
    tl.store(key_cache + to_block * key_stride + inside, states, mask=inside < KEY_ELEMENTS)
    states = tl.load(value_cache + from_block * value_stride + inside, mask=inside < VALUE_ELEMENTS)
    tl.store(value_cache + to_block * value_stride + inside, states, mask=inside < VALUE_ELEMENTS)
