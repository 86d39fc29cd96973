// The rotation of keys that are stored as codes, and of their queries: see quantized.py. Include after a vector_*.h.
#pragma once
#include <cmath>

#include "attention.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// A Walsh-Hadamard transform of each part of `x` of `size` numbers; `x` holds padded(dim).
inline void rotate(float* x, int dim) {
  const int size = dim & -dim, end = padded(dim);
  const Vec unit = splat(1 / std::sqrt(float(size)));
  for (int d = 0; d < end; d += kLanes) {
    Vec v = load(x + d) * unit;
    if (size > 1) v = butterfly<1>(v);
    if (size > 2) v = butterfly<2>(v);
    if constexpr (kLanes > 4)
      if (size > 4) v = butterfly<4>(v);
    if constexpr (kLanes > 8)
      if (size > 8) v = butterfly<8>(v);
    store(x + d, v);
  }
  for (int stride = kLanes; stride < size; stride *= 2)
    for (int first = 0; first < dim; first += 2 * stride)
      for (int d = first; d < first + stride; d += kLanes) {
        const Vec a = load(x + d), b = load(x + d + stride);
        store(x + d, a + b), store(x + d + stride, a - b);
      }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
