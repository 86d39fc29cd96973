// Products of small matrices in scratch memory. Include after a vector_*.h.
#pragma once

namespace hf_paged {
namespace HF_PAGED_ISA {

// Rows and vectors of the block of sums that is kept in registers.
constexpr int kBlockRows = kLanes == 4 ? 4 : 6;
constexpr int kBlockVecs = kLanes == 16 ? 4 : 2;

// An element of a matrix is 4 bytes: a float, or two bfloat16 that stand one after the other in the summed dimension.
struct FloatMul {
  static Vec add(Vec sum, const float* a, Vec b) { return fma(splat(*a), b, sum); }
};

#ifdef __AVX512BF16__
struct PairMul {
  static Vec add(Vec sum, const float* a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(splat(*a)), (__m512bh)_mm512_castps_si512(b));
  }
};
#endif

template <class Mul, int kVecs, bool kAdd, bool kRests>
inline void multiply_block(const float* a, int a_stride, const float* b, int b_stride, int depth, float* c,
                           int c_stride, const float* factors) {
  Vec sums[kBlockRows][kVecs];
#pragma GCC unroll 6
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j)
      sums[i][j] = kAdd ? load(c + i * c_stride + j * kLanes) * splat(factors[i]) : splat(0);
  for (int k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Mul::add(sums[i][j], a + i * a_stride + k, row[j]);
    if (kRests && k < depth / 4 * 3)
#pragma GCC unroll 6
      for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sums[i][j] = Mul::add(sums[i][j], a + i * a_stride + depth + k, row[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// c = a . b, or factors[row] * c + a . b if kAdd. With kRests, a row of `a` goes on after `depth` words with what it
// lost when it was rounded: that of its first three quarters is multiplied as well. `rows` is a multiple of kBlockRows,
// `columns` of kLanes.
template <class Mul, bool kAdd, bool kRests = false>
inline void multiply(const float* a, int a_stride, const float* b, int b_stride, int rows, int columns, int depth,
                     float* c, int c_stride, const float* factors) {
  int j = 0;
  for (; j + kBlockVecs * kLanes <= columns; j += kBlockVecs * kLanes)
    for (int i = 0; i < rows; i += kBlockRows)
      multiply_block<Mul, kBlockVecs, kAdd, kRests>(a + i * a_stride, a_stride, b + j, b_stride, depth,
                                                    c + i * c_stride + j, c_stride, factors + i);
  for (; j < columns; j += kLanes)
    for (int i = 0; i < rows; i += kBlockRows)
      multiply_block<Mul, 1, kAdd, kRests>(a + i * a_stride, a_stride, b + j, b_stride, depth, c + i * c_stride + j,
                                           c_stride, factors + i);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
