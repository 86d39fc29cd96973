// Packing of int8 codes for prefill by dot products of bytes, which are exact. Queries become integers of two signed
// bytes, weights times value scales of two unsigned ones: more than half precision holds.
#pragma once
#include "bytes.h"
#include "pack_bf16.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Words of four bytes, unsigned in `a`, signed in `b`; the sums are integers.
struct BiasedMul {
  static Vec add(Vec sum, Vec a, Vec b) {
    return _mm512_castsi512_ps(
        add_dots(_mm512_castps_si512(sum), _mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

template <int kVecs, int kBits>
HF_PAGED_INLINE inline void shift_left(Vec (&sums)[kBlockRows][kVecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j)
      sums[i][j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(sums[i][j]), kBits));
}

struct BytePack {
  using Mul = BiasedMul;                       // Of keys and queries; values and weights are multiplied in `start`.
  static constexpr bool kIsPlain = false;
  static constexpr float kRestSteps = 0xffff;  // Steps of the largest weight.
  static constexpr int kWeightRows = 4;
  static int depth(int n) { return n / 2; }  // Of a query. A key takes half of that.

  static float query(const float* from, int dim, float* to, int32_t (&starts)[2]) {
    return split_query(from, dim, 2, (int32_t*)to, starts);
  }

  // Bytes biased by 128; what stands past the head size meets zeros of the query.
  static void row(const int8_t* from, int dim, float* to) {
    for (int d = 0; d < dim; d += 64) {
      const __m512i codes = _mm512_maskz_loadu_epi8(first_bytes(dim - d), from + d);
      const __mmask64 padding = first_bytes(padded(dim) - d);
      _mm512_mask_storeu_epi8(to + d / 4, padding, _mm512_xor_si512(codes, _mm512_set1_epi8(-128)));
    }
  }

  // Scores of a block of keys and queries before the last bytes of queries are multiplied.
  template <int kVecs>
  HF_PAGED_INLINE static void start_scores(Vec (&sums)[kBlockRows][kVecs], Rows keys, const float* queries,
                                           float* const (&starts)[2], int stride, int words, int column) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = load(starts[0] + column + j * kLanes);
    add_product<BiasedMul>(sums, keys, queries + column, stride, words);
    shift_left<kVecs, 7>(sums);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const __m512i more = _mm512_castps_si512(load(starts[1] + column + j * kLanes));
#pragma GCC unroll 8
      for (int i = 0; i < kBlockRows; ++i)
        sums[i][j] = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sums[i][j]), more));
    }
  }

  // Sums of products become scores.
  static void scale_scores(float* sums, Vec steps) {
    store(sums, _mm512_cvtepi32_ps(_mm512_castps_si512(load(sums))) * steps);
  }

  // Bytes of four tokens [kTileKeys / 4, stride].
  static void values(const int8_t* const* from, int dim, int stride, float* to) {
    for (int t = 0; t < kTileKeys; t += 4, to += stride)
      for (int d = 0; d < dim; d += 64) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __mmask64 mask = from[t + i] ? first_bytes(dim - d) : 0;
          v[i] = _mm512_maskz_loadu_epi8(mask, from[t + i] + d);
        }
        interleave(v);
        const __m512i low01 = _mm512_shuffle_i32x4(v[0], v[1], 0x44), high01 = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(v[2], v[3], 0x44), high23 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
        _mm512_storeu_si512(to + d, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(to + d + 16, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        if (d + 32 >= padded(dim)) continue;
        _mm512_storeu_si512(to + d + 32, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + d + 48, _mm512_shuffle_i32x4(high01, high23, 0xdd));
      }
  }

  // Those of four tokens, in place of their scores: the upper bytes in row 0, the lower ones in row 1.
  static void weights(const Vec (&of)[4], Vec steps, float* at, int stride) {
    __m512i whole[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) whole[t] = _mm512_cvtps_epi32(of[t] * steps);
    const __m512i low = _mm512_packus_epi32(whole[0], whole[1]), high = _mm512_packus_epi32(whole[2], whole[3]);
    const __m512i byte = _mm512_set1_epi16(0xff);
    const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(low, 8), _mm512_srli_epi16(high, 8));
    const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(low, byte), _mm512_and_si512(high, byte));
    _mm512_storeu_si512(at, side_by_side(upper));
    _mm512_storeu_si512(at + stride, side_by_side(lower));
  }

  // The block of acc at `row`, `column` with the weighted values of `tokens` tokens.
  template <int kVecs>
  HF_PAGED_INLINE static void start(Vec (&sums)[kBlockRows][kVecs], const ValueProduct& product, int row, int column,
                                    int tokens) {
    const int words = (tokens + 3) / 4;
    const Columns values{product.values + row, product.value_stride};
    set_zero(sums);
    add_product<ByteMul>(sums, values, product.weights + column, 4 * product.stride, words);
    shift_left<kVecs, 8>(sums);
    add_product<ByteMul>(sums, values, product.weights + product.stride + column, 4 * product.stride, words);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const int at = column + j * kLanes;
        const Vec sum = _mm512_cvtepi32_ps(_mm512_castps_si512(sums[i][j])) * load(product.rest_scales + at);
        sums[i][j] = fma(load(product.acc + (row + i) * product.stride + at), load(product.factors + at), sum);
      }
  }
};

template <>
inline constexpr bool kPacksBytes<BytePack> = true;

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
