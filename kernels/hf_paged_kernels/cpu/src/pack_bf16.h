// Packing of bfloat16 for dpbf16ps: words of two, neighbours of a query or key, or the same element of two tokens.
//
// Rounded to the 8 bits of a bfloat16, weights would be the largest error of all (SDPA leaves it at that). What a
// weight loses, its rest, is kept in 8 more bits, as a part of the tile's largest, and multiplied by values of 8 bits.
#pragma once
#include "pack.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Bytes 0, 4, 8 and 12 of each quarter, then 1, 5, 9 and 13, and so on.
inline __m512i side_by_side(__m512i quarters) {
  return _mm512_shuffle_epi8(
      quarters, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

template <>
struct Pack<bfloat16> {
  using Mul = PairMul;
  static constexpr bool kIsPlain = true;
  static constexpr float kRestSteps = 128 * 255;  // Cut off after 8 bits, a weight loses less than 1 / 128.
  static constexpr int kWeightRows = 2;
  static int depth(int n) { return n / 2; }

  static void row(const bfloat16* from, int dim, float* to) { Dot<bfloat16>::keep(from, dim, (bfloat16*)to); }

  // Words [kTileKeys / 2, stride], then bytes of four tokens [kTileKeys / 4, stride], then the bytes' scales [stride].
  static void values(const bfloat16* const* from, int dim, int stride, float* to) {
    float *bytes = to + kTileKeys / 2 * stride, *scales = bytes + kTileKeys / 4 * stride;
    for (int d = 0; d < dim; d += kPairLanes) {
      const auto load_token = [&](int t) {
        return _mm512_maskz_loadu_epi16(from[t] ? Dot<bfloat16>::first_elements(dim - d) : 0, from[t] + d);
      };
      __m512i largest = _mm512_setzero_si512();  // Sizes compare as the integers that their bits are.
      for (int t = 0; t < kTileKeys; ++t)
        largest = _mm512_max_epu16(largest, _mm512_and_si512(load_token(t), _mm512_set1_epi16(0x7fff)));
      const Pair sizes = widen(largest);
      store(scales + d, scale_of(sizes.a)), store(scales + d + kLanes, scale_of(sizes.b));
      const Vec even_scale = splat(127) / sizes.a, odd_scale = splat(127) / sizes.b;
      for (int t = 0; t < kTileKeys; t += 4) {
        __m512i even[4], odd[4], token[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          token[i] = load_token(t + i);
          const Pair value = widen(token[i]);
          even[i] = _mm512_cvtps_epi32(value.a * even_scale), odd[i] = _mm512_cvtps_epi32(value.b * odd_scale);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i += 2) {
          float* words = to + (t + i) / 2 * stride + d;
          _mm512_storeu_si512(words, lower_halves(token[i], token[i + 1]));
          _mm512_storeu_si512(words + kLanes, upper_halves(token[i], token[i + 1]));
        }
        _mm512_storeu_si512(bytes + t / 4 * stride + d, signed_bytes(even));
        _mm512_storeu_si512(bytes + t / 4 * stride + d + kLanes, signed_bytes(odd));
      }
    }
  }

  // Words of tokens 0 and 1 in row 0, of 2 and 3 in row 2; the bytes of all rests in row 1.
  static void weights(const Vec (&of)[4], Vec rest_scale, float* at, int stride) {
    __m512i rests[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const Vec kept = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(of[t]), _mm512_set1_epi32(0xffff0000)));
      rests[t] = _mm512_cvtps_epi32((of[t] - kept) * rest_scale);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4; t += 2)
      _mm512_storeu_si512(at + t * stride, upper_halves(_mm512_castps_si512(of[t]), _mm512_castps_si512(of[t + 1])));
    _mm512_storeu_si512(at + stride, unsigned_bytes(rests));
  }

  template <int kVecs>
  HF_PAGED_INLINE static void start(Vec (&sums)[kBlockRows][kVecs], const ValueProduct& product, int row, int column) {
    const float* bytes = product.values + kTileKeys / 2 * product.value_stride + row;
    const float* scales = product.values + kTileKeys / 4 * 3 * product.value_stride + row;
    set_zero(sums);
    add_product<ByteMul>(sums, Columns{bytes, product.value_stride}, product.weights + product.stride + column,
                         4 * product.stride, kTileKeys / 4);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int at = column + j * kLanes;
        const Vec scale = load(product.rest_scales + at) * splat(scales[i]);
        const Vec rest = _mm512_cvtepi32_ps(_mm512_castps_si512(sums[i][j])) * scale;
        sums[i][j] = fma(load(product.acc + (row + i) * product.stride + at), load(product.factors + at), rest);
      }
  }

 private:
  static Vec scale_of(Vec largest) {  // 0 where a value is infinite or no number: its word says so.
    return where_less(largest, splat(INFINITY), largest * splat(1.0f / 127), splat(0));
  }
  static __m512i lower_halves(__m512i low, __m512i high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
  }
  static __m512i upper_halves(__m512i low, __m512i high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
  }
  // Word i: the four numbers i as bytes.
  static __m512i signed_bytes(const __m512i (&of)[4]) {
    return side_by_side(_mm512_packs_epi16(_mm512_packs_epi32(of[0], of[1]), _mm512_packs_epi32(of[2], of[3])));
  }
  static __m512i unsigned_bytes(const __m512i (&of)[4]) {
    return side_by_side(_mm512_packus_epi16(_mm512_packs_epi32(of[0], of[1]), _mm512_packs_epi32(of[2], of[3])));
  }
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
