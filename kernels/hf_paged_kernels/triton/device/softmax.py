"""The running softmax of the attention kernels, in base 2: device code."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2.0**100))  # Below every score, and still finite: its differences are never NaN.


@triton.jit
def capped(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """``softcap * tanh(scores * scale / softcap)`` and the factor that is left; without softcap nothing is done."""
    if HAS_SOFTCAP:
        doubled = tl.exp2(scores * (scale * 2 / softcap))  # `scale` holds the factor log2(e) already.
        return (1 - 2 / (doubled + 1)) * softcap, LOG2_E
    return scores, scale


@triton.jit
def rescale(maximum, scores, factor, AXIS: tl.constexpr):
    """New running maximum, what the old sums must be multiplied with, and the weights."""
    larger = tl.maximum(maximum, tl.max(scores, AXIS) * factor)
    weights = tl.exp2(scores * factor - tl.expand_dims(larger, AXIS))
    return larger, tl.exp2(maximum - larger), weights


@triton.jit
def add_sink(maximum, total, sink):
    """A score without a value: a factor for what was summed, and the new maximum and total."""
    sink = sink.to(tl.float32) * LOG2_E
    larger = tl.maximum(maximum, sink)
    factor = tl.exp2(maximum - larger)
    return factor, larger, total * factor + tl.exp2(sink - larger)


@triton.jit
def inverse(total):
    """``1 / total``; any number for a query that saw nothing, whose sums are zero."""
    return 1 / tl.where(total > 0, total, 1.0)
