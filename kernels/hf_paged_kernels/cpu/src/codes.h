// Numbers become codes with a scale for each vector, as quantized.py says. Include after a vector_*.h.
#pragma once
#include <cstring>
#include <type_traits>

#include "copy.h"
#include "rotate.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// What load_pair gives for a code, times this, is the number that the code stands for.
template <class P>
constexpr float kUnit = std::is_same_v<P, float8> ? 256 : 1;

// Numbers of a vector whose elements lie `stride` apart, in their order; zeros up to the padded size.
template <class T>
inline void load_floats(const T* from, int64_t stride, int dim, float* to) {
  int d = 0;
  if (stride == 1)
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load_lanes(from + d));
  for (; d < padded(dim); d += kLanes) {
    T lanes[kLanes] = {};
    for (int i = 0; i < kLanes && d + i < dim; ++i) lanes[i] = from[(d + i) * stride];
    store(to + d, load_lanes(lanes));
  }
}

// `first`: elements before the vector.
inline void load_floats(Dtype dtype, const void* from, int64_t first, int64_t stride, int dim, float* to) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load_floats((const float*)from + first, stride, dim, to);
    case Dtype::kBFloat16:
      return load_floats((const bfloat16*)from + first, stride, dim, to);
    case Dtype::kFloat16:
      return load_floats((const float16*)from + first, stride, dim, to);
  }
}

// The largest number that a code stands for.
template <class P>
constexpr float kLargestCode = std::is_same_v<P, float8> ? 448 : 127;

typedef int32_t Words __attribute__((vector_size(sizeof(Vec))));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// Codes of numbers up to the largest, rounded to the nearest, ties to even.
inline Words encode(Vec numbers, const int8_t*) { return __builtin_convertvector(round(numbers), Words); }
inline Words encode(Vec numbers, const float8*) {
  const Words bits = (Words)numbers, size = bits & 0x7fffffff;
  // The upper three bits of the mantissa are kept; the biases differ by 120.
  const Words normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  const Words subnormal = __builtin_convertvector(round((Vec)size * splat(512)), Words);
  const Words is_normal = size >= 0x3c800000;  // 2^-6
  return (normal & is_normal) | (subnormal & ~is_normal) | ((bits >> 24) & 0x80);
}

// The size of the largest number; NaN if one is not finite.
inline float largest_size(const float* numbers, int dim) {
  Vec most = splat(0), zeros = splat(0);
  for (int d = 0; d < dim; d += kLanes) {
    const Vec v = load(numbers + d);
    most = max(most, max(v, splat(0) - v)), zeros = fma(v, splat(0), zeros);
  }
  return max_lane(most) + sum_lanes(zeros);
}

// Codes of `numbers`, as many as are padded(dim). Returns their scale: NaN, and codes of zero, where a number is not
// finite.
template <class P>
inline float encode(const float* numbers, int dim, P* codes) {
  const float scale = largest_size(numbers, dim) / kLargestCode<P>;
  if (scale != scale) {
    memset(codes, 0, dim * sizeof(P));
    return scale;
  }
  const Vec divisor = splat(scale > 0 ? scale : 1), largest = splat(kLargestCode<P>), least = splat(-kLargestCode<P>);
  for (int d = 0; d < dim; d += kLanes) {
    Vec v = load(numbers + d) / divisor;
    v = max(where_less(v, largest, v, largest), least);
    const Bytes bytes = __builtin_convertvector(encode(v, codes), Bytes);
    memcpy(codes + d, &bytes, sizeof bytes);
  }
  return scale;
}

// Stores one token of `w` in its slot, encoded.
template <class P>
void store_codes(const Write& w, int64_t token, int64_t slot) {
  const int dim = int(w.head_dim);
  int64_t place = slot / w.block_size * w.num_kv_heads * w.block_size + slot % w.block_size;
  int64_t first = token * w.state_strides[0];
  for (int64_t head = 0; head < w.num_kv_heads; ++head, place += w.block_size, first += w.state_strides[1]) {
    float numbers[kMaxHeadDim];
    P codes[kMaxHeadDim];
    load_floats(w.dtype, w.states, first, w.state_strides[2], dim, numbers);
    if (w.is_rotated) rotate(numbers, dim);
    w.scales[place] = encode(numbers, dim, codes);
    memcpy(w.cache + place * dim, codes, dim);
  }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
