// Products of small matrices in scratch memory. Include after a vector_*.h.
#pragma once

namespace hf_paged {
namespace HF_PAGED_ISA {

// Rows and vectors of the block of sums that is kept in registers; all that touches it is inlined.
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

// Words of four bytes, signed in `a`, unsigned in `b`; the sums are integers.
struct ByteMul {
  static Vec add(Vec sum, Vec a, Vec b) {
    // The intrinsic wants another type of sums, for which GCC copies each to memory and back.
    __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
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

// sums += a . b
template <class Mul, int kVecs, class Left>
HF_PAGED_INLINE inline void add_product(Vec (&sums)[kBlockRows][kVecs], Left a, const float* b, int b_stride,
                                        int depth) {
  for (int k = 0; k < depth; ++k, b += b_stride) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const Vec left = splat(*a.at(i, k));
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Mul::add(sums[i][j], left, row[j]);
    }
  }
}

template <int kVecs>
HF_PAGED_INLINE inline void set_zero(Vec (&sums)[kBlockRows][kVecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[i][j] = splat(0);
}

// A function of its own, so that nothing else wants registers.
template <class Mul, int kVecs, class Left, class Start>
__attribute__((noinline)) void multiply_block(Left a, const float* b, int b_stride, int depth, float* c, int c_stride,
                                              Start start) {
  Vec sums[kBlockRows][kVecs];
  start(sums);
  add_product<Mul>(sums, a, b, b_stride, depth);
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// c = start + a . b. `rows` is a multiple of kBlockRows, `columns` of kLanes; `start` gives the blocks of sums.
template <class Mul, class Left, class Start>
inline void multiply(Left a, const float* b, int b_stride, int rows, int columns, int depth, float* c, int c_stride,
                     Start start) {
  for (int j = 0; j < columns; j += kBlockVecs * kLanes) {
    const int vecs = (columns - j) / kLanes;
    for (int i = 0; i < rows; i += kBlockRows) {
      const auto start_block = [&](auto& sums) HF_PAGED_INLINE { start(sums, i, j); };
      float* block = c + i * c_stride + j;
      if (vecs >= 3) multiply_block<Mul, 3>(a.from(i), b + j, b_stride, depth, block, c_stride, start_block);
      if (vecs == 2) multiply_block<Mul, 2>(a.from(i), b + j, b_stride, depth, block, c_stride, start_block);
      if (vecs == 1) multiply_block<Mul, 1>(a.from(i), b + j, b_stride, depth, block, c_stride, start_block);
    }
  }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
