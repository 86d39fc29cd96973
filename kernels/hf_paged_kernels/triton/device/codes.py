"""Codes of quantised pages and the rotation of keys and queries, as `hf_paged_kernels.quantized` says: device code.

Codes of float8 are bytes here: sm80 and gfx942 do not convert them, and the few operations on integers below compute
the same on every GPU and in the interpreter. They are as fast as the conversions of sm90, which go through float16.

Products are made in the dtype of the queries and added up in float32. Tensor cores for float8 would keep fewer bits of
long sums, which vLLM has to add up in two levels; they are not used, so that is not needed here.
"""

import triton
import triton.language as tl

SCALES = ("key_scales", "value_scales")  # Arguments of kernels: read number by number, so they may lie anywhere.
_MOST_MIXED = tl.constexpr(64)  # Channels that one matrix product mixes: its matrix has to fit in registers.
# Added to a number below 2**22, it leaves the nearest integer in the lowest bits, ties to even.
_ROUNDER, _ROUNDER_BITS = tl.constexpr(1.5 * 2.0**23), tl.constexpr(0x4B400000)
_EIGHTS, _EIGHTS_BITS = tl.constexpr(1.5 * 2.0**14), tl.constexpr(0x46C00000)  # The same in steps of 2**-9.


@triton.jit
def load_scales(scales_at, pages, is_stored):
    """Scales of tokens, zero where no token of the row is stored: whatever the slot holds may be NaN."""
    return tl.load(scales_at + pages, mask=is_stored, other=0.0)


@triton.jit
def widened(codes, dtype: tl.constexpr):
    """Codes as the numbers they stand for, exact in every dtype of queries; states of other pages as they are."""
    if codes.dtype == tl.int8:
        # Conversions of integers are slow on some GPUs, and use up registers on others.
        return ((codes.to(tl.int32) + _ROUNDER_BITS).to(tl.float32, bitcast=True) - _ROUNDER).to(dtype)
    elif codes.dtype == tl.uint8:
        # Shifted to where exponents of `dtype` end, with the sign kept, it is the number times a power of two.
        code = codes.to(tl.int8, bitcast=True)
        if dtype == tl.float16:
            return ((code.to(tl.int16) << 7) & -0x4080).to(dtype, bitcast=True) * 2.0**8
        elif dtype == tl.bfloat16:
            return ((code.to(tl.int16) << 4) & -0x7810).to(dtype, bitcast=True) * 2.0**120
        else:
            return ((code.to(tl.int32) << 20) & -0x78100000).to(dtype, bitcast=True) * 2.0**120
    else:
        return codes


@triton.jit
def scaled_values(values, scales):
    """Values of pages in float16 times their scales: there small weights times small scales would be nothing."""
    if values.dtype == tl.float16:
        return (values.to(tl.float32) * tl.expand_dims(scales, -1)).to(tl.float16)
    else:
        return values


@triton.jit
def scaled_weights(weights, scales, dtype: tl.constexpr):
    """Weights times the scales of values, unless `scaled_values` has these already."""
    if dtype == tl.float16:
        return weights
    else:
        return weights * tl.expand_dims(scales, -2)


@triton.jit
def rotated(states, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Rotate vectors ``[ROWS, LANES]`` by SIZE channels that lie side by side, in float32.

    The first 64 channels or fewer are mixed by a product with a matrix of 1 and -1, which half precision holds, the
    others by sums and differences.
    """
    ROWS: tl.constexpr = states.shape[0]
    LANES: tl.constexpr = states.shape[1]
    # Without tensor cores a product of 16 is enough work.
    MOST: tl.constexpr = 16 if states.dtype == tl.float32 else _MOST_MIXED
    WIDTH: tl.constexpr = min(max(SIZE, 16), MOST)
    MIXED: tl.constexpr = min(SIZE, WIDTH)
    if SIZE > 1:
        numbers = tl.arange(0, WIDTH)
        parity = numbers[:, None] & numbers[None, :] & (MIXED - 1)
        parity = parity ^ (parity >> 4)
        parity = parity ^ (parity >> 2)
        parity = (parity ^ (parity >> 1)) & 1
        is_mixed = numbers[:, None] // MIXED == numbers[None, :] // MIXED
        signs = tl.where(is_mixed, 1 - 2 * parity, 0).to(states.dtype)
        mixed = tl.dot(tl.reshape(states, (ROWS * LANES // WIDTH, WIDTH)), signs, input_precision=PRECISION)
        mixed = tl.reshape(mixed, (ROWS, LANES))
        for stage in tl.static_range(5):
            if WIDTH << stage < SIZE:
                mixed = _sums_and_differences(mixed, WIDTH << stage)
        return mixed * SIZE**-0.5
    else:
        return states.to(tl.float32)


@triton.jit
def _sums_and_differences(states, HALF: tl.constexpr):
    """Mix each HALF channels with the HALF beside them."""
    pairs = tl.reshape(states, (states.numel // (2 * HALF), 2, HALF))
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), states.shape)


@triton.jit
def quantized(states, dtype: tl.constexpr):
    """Codes and scales of vectors ``[ROWS, LANES]`` in float32; `dtype` is that of the page, bytes for float8.

    Returns
    -------
    codes, scales
        ``[ROWS, LANES]`` and ``[ROWS]`` float32, which is not finite where the vector is not.
    """
    LARGEST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    is_number = states == states
    scales = tl.max(tl.where(is_number, tl.abs(states), float("inf")), 1) / LARGEST
    codes = states * (1 / tl.where(scales > 0, scales, 1.0))[:, None]
    codes = tl.where(codes == codes, codes, 0.0)
    codes = tl.minimum(tl.maximum(codes, -LARGEST), LARGEST)
    if dtype == tl.int8:
        return (codes + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8), scales
    else:
        return _float8(codes), scales


@triton.jit
def _float8(numbers):
    """The nearest numbers of float8_e4m3fn, ties to even, as bytes; none is beyond the largest."""
    magnitude = tl.abs(numbers)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude + _EIGHTS).to(tl.int32, bitcast=True) - _EIGHTS_BITS
    sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < 2.0**-6, small, normal) | sign).to(tl.uint8)
