// Products of small matrices in scratch memory. Include after a vector_*.h.
#pragma once

namespace hf_paged {
namespace HF_PAGED_ISA {

// Rows and vectors of the block of sums that is kept in registers.
constexpr int kBlockRows = kLanes == 16 ? 8 : 4;
constexpr int kBlockVecs = 3;

// An element of a matrix is 4 bytes: a float, or two bfloat16 that stand one after the other in the summed dimension.
struct FloatMul {
  static Vec add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__
struct PairMul {
  static Vec add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};
#endif

// A left matrix, given by its rows, wherever they lie ...
struct Rows {
  const float* const* rows;
  const float* at(int row, int k) const { return rows[row] + k; }
  Rows from(int row) const { return {rows + row}; }
};

// ... or by its columns, `stride` elements apart.
struct Columns {
  const float* first;
  int stride;
  const float* at(int row, int k) const { return first + k * stride + row; }
  Columns from(int row) const { return {first + row, stride}; }
};

// sums += column k of `a` times the row at `b`; and times the row at `rest` if kRest.
template <class Mul, bool kRest, int kVecs, class Left>
inline void add_product(Vec (&sums)[kBlockRows][kVecs], Left a, int k, const float* b, const float* rest) {
  Vec row[kVecs], rest_row[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    row[j] = load(b + j * kLanes);
    if (kRest) rest_row[j] = load(rest + j * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
    const Vec left = splat(*a.at(i, k));
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[i][j] = Mul::add(sums[i][j], left, row[j]);
#pragma GCC unroll 4
    for (int j = 0; kRest && j < kVecs; ++j) sums[i][j] = Mul::add(sums[i][j], left, rest_row[j]);
  }
}

template <class Mul, int kVecs, bool kAdd, int kRests, class Left>
inline void multiply_block(Left a, const float* b, int b_stride, int depth, float* c, int c_stride,
                           const float* factors) {
  Vec sums[kBlockRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j)
      sums[i][j] = kAdd ? load(c + i * c_stride + j * kLanes) * load(factors + j * kLanes) : splat(0);
  // The block below is the next to be added to.
  const auto bring = [&](int k) {
    if (kAdd && k < kBlockRows * kVecs)
      __builtin_prefetch(c + (kBlockRows + k / kVecs) * c_stride + k % kVecs * kLanes, 1, 3);
  };
  int k = 0;
  for (; k < kRests && k < depth; ++k, b += b_stride, bring(k)) add_product<Mul, true>(sums, a, k, b, b + b_stride / 2);
  for (; k < depth; ++k, b += b_stride, bring(k)) add_product<Mul, false>(sums, a, k, b, nullptr);
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// c = a . b, or factors * c + a . b if kAdd, a factor for each column. The first kRests rows of `b` stand each before
// a row of what they lost when they were rounded, which is multiplied as well. `rows` is a multiple of kBlockRows,
// `columns` of kLanes. Calls `between` after each block.
template <class Mul, bool kAdd, int kRests, class Left, class Between>
inline void multiply(Left a, const float* b, int b_stride, int rows, int columns, int depth, float* c, int c_stride,
                     const float* factors, Between between) {
  for (int j = 0; j < columns; j += kBlockVecs * kLanes) {
    const int vecs = (columns - j) / kLanes;
    const auto block = vecs >= 3   ? multiply_block<Mul, 3, kAdd, kRests, Left>
                       : vecs == 2 ? multiply_block<Mul, 2, kAdd, kRests, Left>
                                   : multiply_block<Mul, 1, kAdd, kRests, Left>;
    for (int i = 0; i < rows; i += kBlockRows, between())
      block(a.from(i), b + j, b_stride, depth, c + i * c_stride + j, c_stride, factors + j);
  }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
