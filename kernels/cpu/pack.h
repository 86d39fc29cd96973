// Queries, keys, values and weights in the layouts that matmul.h multiplies. Include after dot.h.
#pragma once
#include "matmul.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Everything as floats. Head elements stand in the order of pairs of T: in queries and keys alike, and so
// in values and outputs.
template <class T>
struct Pack {
  using Mul = FloatMul;
  static constexpr int kRests = 0;         // Rows of weights that are followed by what they lost, see multiply.
  static constexpr int kWeightRows = 1;    // From one row of weights to the next.
  static constexpr bool kIsPlain = sizeof(T) == sizeof(float);  // Whether memory holds whole pairs as words already.
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
  // Those of two tokens that follow each other, in place of their scores.
  static void weights(Vec first, Vec second, float* at, int stride) { store(at, first), store(at + stride, second); }
};

#ifdef __AVX512BF16__
// Words of two bfloat16: neighbours of a query or key, or the same element of two tokens' values.
template <>
struct Pack<bfloat16> {
  using Mul = PairMul;
  // Rounded to 8 bits, weights would be the largest error of all (SDPA leaves it at that). Three quarters of a tile's
  // tokens keep 16 bits: with half of them some errors are above 2 ulp + 1e-3 of the largest output.
  static constexpr int kRests = kTileKeys / 2 / 4 * 3;
  static constexpr int kWeightRows = 2;
  static constexpr bool kIsPlain = true;
  static int depth(int n) { return n / 2; }

  static void row(const bfloat16* from, int dim, float* to) { Dot<bfloat16>::keep(from, dim, (bfloat16*)to); }
  static void values(const bfloat16* const* from, int dim, int stride, float* to) {
    for (int t = 0; t < kTileKeys; t += 2, to += stride)
      for (int d = 0; d < dim; d += kPairLanes) {
        const __mmask32 mask = Dot<bfloat16>::first_elements(dim - d);
        const __m512i first = _mm512_maskz_loadu_epi16(from[t] ? mask : 0, from[t] + d);
        const __m512i second = _mm512_maskz_loadu_epi16(from[t + 1] ? mask : 0, from[t + 1] + d);
        _mm512_storeu_si512(to + d, _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16)));
        _mm512_storeu_si512(to + d + kLanes, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second));
      }
  }
  static void weights(Vec first, Vec second, float* at, int stride) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(first), half);
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(second), half);
    _mm512_storeu_si512(at, pair(a, b));
    const Vec rest_a = first - _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    const Vec rest_b = second - _mm512_castsi512_ps(_mm512_and_si512(b, upper));
    _mm512_storeu_si512(at + stride, pair(_mm512_castps_si512(rest_a), _mm512_castps_si512(rest_b)));
  }
  // The upper halves of two words.
  static __m512i pair(__m512i low, __m512i high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
  }
};
#endif

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
