// Queries, keys, values and weights in the layouts that matmul.h multiplies. Include after dot.h.
#pragma once
#include "codes.h"
#include "matmul.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Codes are packed as bytes, which the scales of keys and values are no part of: they go on scores and weights.
template <class Packing>
constexpr bool kPacksBytes = false;

// Where a tile's product with the values stands: acc = acc * factors + values . weights.
struct ValueProduct {
  const float* values;  // As Pack::values left them.
  int value_stride;
  const float *weights, *acc, *factors, *rest_scales;
  int stride;  // Of weights and acc.
};

// Everything as floats. Head elements stand in the order of pairs of T: in queries and keys alike, and so
// in values and outputs.
template <class T>
struct Pack {
  using Mul = FloatMul;
  static constexpr bool kIsPlain = sizeof(T) == sizeof(float);  // Memory holds whole pairs as words already.
  static constexpr float kRestSteps = 0;                        // Steps of a weight's size that rests count; 0: none.
  static constexpr int kWeightRows = 1;                         // From a row of weights to the next.
  static int depth(int n) { return n; }  // Words that n summed numbers take; n is a multiple of kPad.

  // Zeros up to the padded size: what stands there is multiplied as well.
  static void row(const T* from, int dim, float* to) {
    int d = 0;
    for (; d + kPairLanes <= dim; d += kPairLanes) keep(to + d, load_pair(from + d));
    if (d < dim) keep(to + d, load_pair(from + d, dim - d)), d += kPairLanes;
    for (; d < padded(dim); d += kPairLanes) keep(to + d, {splat(0), splat(0)});
  }
  static void keep(float* to, Pair pair) { store(to, pair.a), store(to + kLanes, pair.b); }
  // values [kTileKeys, stride]; null stands for a row of zeros.
  static void values(const T* const* from, int dim, int stride, float* to) {
    for (int t = 0; t < kTileKeys; ++t, to += stride) {
      if (from[t])
        row(from[t], dim, to);
      else
        memset(to, 0, stride * sizeof(float));
    }
  }
  // Those of four tokens, in place of their scores.
  static void weights(const Vec (&of)[4], Vec, float* at, int stride) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) store(at + t * stride, of[t]);
  }
  // What the block of acc at `row`, `column` is before words are multiplied.
  template <int kVecs>
  HF_PAGED_INLINE static void start(Vec (&sums)[kBlockRows][kVecs], const ValueProduct& product, int row, int column) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int at = column + j * kLanes;
        sums[i][j] = load(product.acc + (row + i) * product.stride + at) * load(product.factors + at);
      }
  }
};

// Codes as the floats that they stand for, in their order. Scales are in units of kUnit.
template <class P>
struct CodePack : Pack<float> {
  using Pack<float>::row;  // Of queries.
  static void row(const P* from, float scale, int dim, float* to) {
    const Vec unit = splat(scale);
    const auto keep_pair = [&](int d, Pair pair) { keep(to + d, {pair.a * unit, pair.b * unit}); };
    int d = 0;
    for (; d + kPairLanes <= dim; d += kPairLanes) keep_pair(d, load_pair(from + d));
    if (d < dim) keep_pair(d, load_pair(from + d, dim - d)), d += kPairLanes;
    for (; d < padded(dim); d += kPairLanes) keep(to + d, {splat(0), splat(0)});
  }
  static void values(const P* const* from, const float* scales, int dim, int stride, float* to) {
    for (int t = 0; t < kTileKeys; ++t, to += stride) {
      if (from[t])
        row(from[t], scales[t], dim, to);
      else
        memset(to, 0, stride * sizeof(float));
    }
  }
};

// The first kLanes floats of each of `rows` rows become columns.
inline void turn(const float* from, int from_stride, int rows, float* to, int to_stride) {
  for (int row = 0; row < rows; row += kLanes) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load(from + (row + i) * from_stride);
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store(to + i * to_stride + row, block[i]);
  }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
