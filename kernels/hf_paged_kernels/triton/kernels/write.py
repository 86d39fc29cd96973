"""New keys and values into their slots."""

import triton
import triton.language as tl

from hf_paged_kernels.triton.device.codes import SCALES, quantized, rotated


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slot_mapping", *SCALES])
def write_kernel(
    key, value, key_cache, value_cache, key_scales, value_scales, slot_mapping, num_tokens,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    NUM_KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_STRIDES: tl.constexpr, VALUE_STRIDES: tl.constexpr, KEY_LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    KEY_SCALE_STRIDES: tl.constexpr, VALUE_SCALE_STRIDES: tl.constexpr, ROTATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS pairs (token, KV head). A negative slot is not written: a captured graph may be padded."""
    pairs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = pairs // NUM_KV_HEADS, pairs % NUM_KV_HEADS
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    block, inside, is_written = slot // BLOCK_SIZE, slot % BLOCK_SIZE, (slot >= 0)[:, None]

    lanes = tl.arange(0, KEY_LANES)[None, :]
    source = (token * key_token_stride + head * key_head_stride)[:, None] + lanes
    target = (block * KEY_STRIDES[0] + head * KEY_STRIDES[1] + inside * KEY_STRIDES[2])[:, None] + lanes
    mask = is_written & (lanes < KEY_DIM)
    if key_scales is not None:
        states = rotated(tl.load(key + source, mask=mask, other=0.0), ROTATION, PRECISION)
        codes, scales = quantized(states, key_cache.dtype.element_ty)
        at = block * KEY_SCALE_STRIDES[0] + head * KEY_SCALE_STRIDES[1] + inside * KEY_SCALE_STRIDES[2]
        tl.store(key_cache + target, codes, mask=mask)
        tl.store(key_scales + at, scales, mask=slot >= 0)
    else:
        tl.store(key_cache + target, tl.load(key + source, mask=mask), mask=mask)

    lanes = tl.arange(0, VALUE_LANES)[None, :]
    source = (token * value_token_stride + head * value_head_stride)[:, None] + lanes
    target = (block * VALUE_STRIDES[0] + head * VALUE_STRIDES[1] + inside * VALUE_STRIDES[2])[:, None] + lanes
    mask = is_written & (lanes < VALUE_DIM)
    if value_scales is not None:
        states = tl.load(value + source, mask=mask, other=0.0).to(tl.float32)
        codes, scales = quantized(states, value_cache.dtype.element_ty)
        at = block * VALUE_SCALE_STRIDES[0] + head * VALUE_SCALE_STRIDES[1] + inside * VALUE_SCALE_STRIDES[2]
        tl.store(value_cache + target, codes, mask=mask)
        tl.store(value_scales + at, scales, mask=slot >= 0)
    else:
        tl.store(value_cache + target, tl.load(value + source, mask=mask), mask=mask)
