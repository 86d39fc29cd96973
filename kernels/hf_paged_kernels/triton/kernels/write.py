"""New keys and values into their slots."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slot_mapping"])
def write_kernel(
    key, value, key_cache, value_cache, slot_mapping, num_tokens,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    NUM_KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_STRIDES: tl.constexpr, VALUE_STRIDES: tl.constexpr, KEY_LANES: tl.constexpr, VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
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
    tl.store(key_cache + target, tl.load(key + source, mask=mask), mask=mask)

    lanes = tl.arange(0, VALUE_LANES)[None, :]
    source = (token * value_token_stride + head * value_head_stride)[:, None] + lanes
    target = (block * VALUE_STRIDES[0] + head * VALUE_STRIDES[1] + inside * VALUE_STRIDES[2])[:, None] + lanes
    mask = is_written & (lanes < VALUE_DIM)
    tl.store(value_cache + target, tl.load(value + source, mask=mask), mask=mask)
