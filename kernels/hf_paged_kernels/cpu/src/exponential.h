// Exponentials and hyperbolic tangents of vectors, to about 1e-7. Include after a vector_*.h.
#pragma once

namespace hf_paged {
namespace HF_PAGED_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0; 0 where x is below the range of floats, -infinity included.
inline Vec exp2(Vec x) {
  x = max(x, splat(-200.0f));
  const Vec whole = round(x), rest = x - whole;  // rest is in [-0.5, 0.5].
  // Chebyshev interpolation of 2^rest, off by 2.5e-9 at most.
  Vec p = fma(splat(1.546144469646172e-4f), rest, splat(1.3400428177419153e-3f));
  p = fma(p, rest, splat(9.61805667852609e-3f));
  p = fma(p, rest, splat(5.550327226670944e-2f));
  p = fma(p, rest, splat(0.24022650922288827f));
  p = fma(p, rest, splat(0.6931472067028321f));
  p = fma(p, rest, splat(1.0f));
  return times_power_of_2(p, whole);
}

inline Vec tanh(Vec x) {
  const Vec size = max(x, splat(0) - x);
  // Below 0.6 the quotient would cancel: interpolation of tanh(x) / x in x^2, off by 2.6e-9 at most.
  const Vec square = x * x;
  Vec series = fma(splat(-0.00584964391328512f), square, splat(0.02075134910881855f));
  series = fma(series, square, splat(-0.05376798350902719f));
  series = fma(series, square, splat(0.1333167963456108f));
  series = fma(series, square, splat(-0.3333328283432482f));
  series = fma(series, square, splat(0.9999999974801556f)) * x;
  const Vec small = exp2(size * splat(-2 * kLog2E));
  const Vec large = (splat(1) - small) / (splat(1) + small);
  return where_less(size, splat(0.6f), series, where_less(x, splat(0), splat(0) - large, large));
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
