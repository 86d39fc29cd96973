// Vectors of 16 floats on AVX512 (F, BW, VL, DQ).
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "attention.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float max_lane(Vec v) { return _mm512_reduce_max_ps(v); }
inline float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
inline Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for an integral n; 0 far below the range of floats.
inline Vec times_power_of_2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

// Lane i is the sum of a[i].
inline Vec sum_each(const Vec (&a)[16]) {
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec* v = a + 4 * i;
    const Vec ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const Vec cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))) +
              _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  }
  const Vec low = _mm512_shuffle_f32x4(four[0], four[1], 0x44) + _mm512_shuffle_f32x4(four[0], four[1], 0xee);
  const Vec high = _mm512_shuffle_f32x4(four[2], four[3], 0x44) + _mm512_shuffle_f32x4(four[2], four[3], 0xee);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

// Rows become columns.
inline void transpose(Vec (&a)[16]) {
  __m512d pairs[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[i], a[i + 1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[i], a[i + 1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[i + 2], a[i + 3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[i + 2], a[i + 3]));
    pairs[i] = _mm512_unpacklo_pd(low01, low23), pairs[i + 1] = _mm512_unpackhi_pd(low01, low23);
    pairs[i + 2] = _mm512_unpacklo_pd(high01, high23), pairs[i + 3] = _mm512_unpackhi_pd(high01, high23);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // Quarter q of pairs[i + 4 * j] holds columns 4 * q + i of rows 4 * j and on.
    const Vec r0 = _mm512_castpd_ps(pairs[i]), r1 = _mm512_castpd_ps(pairs[i + 4]);
    const Vec r2 = _mm512_castpd_ps(pairs[i + 8]), r3 = _mm512_castpd_ps(pairs[i + 12]);
    const Vec even01 = _mm512_shuffle_f32x4(r0, r1, 0x88), odd01 = _mm512_shuffle_f32x4(r0, r1, 0xdd);
    const Vec even23 = _mm512_shuffle_f32x4(r2, r3, 0x88), odd23 = _mm512_shuffle_f32x4(r2, r3, 0xdd);
    a[i] = _mm512_shuffle_f32x4(even01, even23, 0x88), a[i + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    a[i + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88), a[i + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// A pair holds 2 * kLanes elements, in an order of its own for each dtype: loads and stores agree on it.
struct Pair {
  Vec a, b;
};

inline Pair load_pair(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
inline Pair load_pair(const float* p, int n) {  // n elements, zeros after them.
  return {_mm512_maskz_loadu_ps(first_lanes(n), p), _mm512_maskz_loadu_ps(first_lanes(n - 16), p + 16)};
}
inline void store_pair(float* p, Pair v) { store(p, v.a), store(p + 16, v.b); }

inline Pair widen(__m512i bits) {
  // Elements 0, 2, 4 ... and 1, 3, 5 ...: half the work of widening them in order.
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))))};
}
inline Pair load_pair(const bfloat16* p) { return widen(_mm512_loadu_si512(p)); }
inline Pair load_pair(const bfloat16* p, int n) {
  return widen(_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p));
}
inline __m512i rounded(Vec v) {  // To the nearest bfloat16, ties to even, in the upper half of each lane.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
inline void store_pair(bfloat16* p, Pair v) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(v.a), 16), rounded(v.b)));
}

inline Pair load_pair(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
          _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)))};
}
inline Pair load_pair(const float16* p, int n) {
  const __m512i bits = _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}
inline void store_pair(float16* p, Pair v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

inline Pair widen(__m256i codes, const int8_t*) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))),
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)))};
}
inline Pair widen(__m256i codes, const float8*) {
  // The sign stands in bits 7 to 15, the rest below: shifted, all but bit 14 are those of a float16, of 1 / 256.
  const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);
  const __m512i halves = _mm512_and_si512(shifted, _mm512_set1_epi16(int16_t(0xbfff)));
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
// Codes in their order, in units of kUnit.
template <class P, std::enable_if_t<kIsCode<P>, int> = 0>
inline Pair load_pair(const P* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), p);
}
template <class P, std::enable_if_t<kIsCode<P>, int> = 0>
inline Pair load_pair(const P* p, int n) {
  return widen(_mm256_maskz_loadu_epi8(n >= 32 ? ~0u : (1u << n) - 1, p), p);
}

// kLanes numbers in their order.
inline Vec load_lanes(const float* p) { return load(p); }
inline Vec load_lanes(const bfloat16* p) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
inline Vec load_lanes(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// Of two lanes kStride apart the first becomes their sum, the second their difference.
template <int kStride>
inline Vec butterfly(Vec v) {
  const Vec other = kStride == 1   ? _mm512_permute_ps(v, 0xb1)
                    : kStride == 2 ? _mm512_permute_ps(v, 0x4e)
                    : kStride == 4 ? _mm512_shuffle_f32x4(v, v, 0xb1)
                                   : _mm512_shuffle_f32x4(v, v, 0x4e);
  constexpr __mmask16 kSecond = kStride == 1 ? 0xaaaa : kStride == 2 ? 0xcccc : kStride == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_sub_ps(v + other, kSecond, other, v);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
