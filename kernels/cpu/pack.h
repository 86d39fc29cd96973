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
  static constexpr bool kRests = false;  // See multiply.
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
  static void weights(Vec low, Vec high, float* row, int t) { store(row + t, low), store(row + t + kLanes, high); }
};

#ifdef __AVX512BF16__
// Words of two bfloat16: neighbours of a query or key, or the same element of two tokens' values.
template <>
struct Pack<bfloat16> {
  using Mul = PairMul;
  static constexpr bool kRests = true;
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
  // Rounded to 8 bits they would be the largest error of all (SDPA leaves it at that). Three quarters of a tile's
  // tokens keep 16 bits: with half of them some errors are above 2 ulp + 1e-3 of the largest output.
  static void weights(Vec first, Vec second, float* row, int t) {
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(row + t / 2, high);
    const Pair even_odd = widen(high);
    const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(index, _mm512_set1_epi32(8));
    const Vec rest_first = first - _mm512_permutex2var_ps(even_odd.a, index, even_odd.b);
    const Vec rest_second = second - _mm512_permutex2var_ps(even_odd.a, upper, even_odd.b);
    _mm512_storeu_si512(row + (kTileKeys + t) / 2, (__m512i)_mm512_cvtne2ps_pbh(rest_second, rest_first));
  }
};
#endif

// keys [words, kTileKeys] from the words of each token.
inline void transpose_keys(const float* const* tokens, int words, float* keys) {
  for (int w = 0; w < words; w += kLanes)
    for (int t = 0; t < kTileKeys; t += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(tokens[t + i] + w);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(keys + (w + i) * kTileKeys + t, block[i]);
    }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
