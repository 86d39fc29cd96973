"""Addresses and loads of tokens in the pages: device code."""

import triton
import triton.language as tl


@triton.jit
def block_ids(table, tokens, end, BLOCK_SIZE: tl.constexpr):
    """Blocks of tokens of one row, int32; 0 from token `end` on, where the table may have no entry."""
    if end is None:
        ids = tl.load(table + tokens // BLOCK_SIZE)
    else:
        ids = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    return ids.to(tl.int32)


@triton.jit
def page_offsets(ids, tokens, BLOCK_SIZE: tl.constexpr, STRIDES: tl.constexpr, TILE: tl.constexpr):
    """Offsets of TILE tokens from the addresses of `first_slots`, in a cache of strides (block, head, slot)."""
    offsets = ids.to(tl.int64) * STRIDES[0]
    if TILE % BLOCK_SIZE != 0:
        offsets += (tokens % BLOCK_SIZE) * STRIDES[2]
    return offsets


@triton.jit
def first_slots(tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Slots of the first tile's tokens in their blocks, where these are the same in every tile; else 0."""
    if TILE % BLOCK_SIZE == 0:
        return tokens % BLOCK_SIZE
    return tokens * 0


@triton.jit
def load_states(pointers, is_stored, lanes, DIM: tl.constexpr, LANES: tl.constexpr):
    """Keys or values, ``[..., LANES]``; zero where no token of the row is stored, whatever the slot holds."""
    mask = tl.expand_dims(is_stored, -1)
    if DIM != LANES:
        mask = mask & (lanes < DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_whole(pointers, lanes, DIM: tl.constexpr, LANES: tl.constexpr):
    """`load_states` where every token is stored."""
    if DIM != LANES:
        return tl.load(pointers, mask=tl.broadcast_to(lanes < DIM, pointers.shape), other=0.0)
    return tl.load(pointers)
