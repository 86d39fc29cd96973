// Vectors of 8 floats on AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "attention.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float max_lane(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_lanes(Vec v) {
  __m128 s = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  s = s + _mm_movehl_ps(s, s);
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for an integral n <= 127; 0 below the range of normal floats.
inline Vec times_power_of_2(Vec p, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const Vec in_range = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_GE_OQ);
  return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), in_range);
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

// Lane i is the sum of a[i].
inline Vec sum_each(const Vec (&a)[8]) {
  Vec four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    const Vec* v = a + 4 * i;
    const Vec ab = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
    const Vec cd = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
    four[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))) +
              _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
  }
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31);
}

// Rows become columns.
inline void transpose(Vec (&a)[8]) {
  __m256d pairs[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(a[i], a[i + 1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(a[i], a[i + 1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(a[i + 2], a[i + 3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(a[i + 2], a[i + 3]));
    pairs[i] = _mm256_unpacklo_pd(low01, low23), pairs[i + 1] = _mm256_unpackhi_pd(low01, low23);
    pairs[i + 2] = _mm256_unpacklo_pd(high01, high23), pairs[i + 3] = _mm256_unpackhi_pd(high01, high23);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec top = _mm256_castpd_ps(pairs[i]), bottom = _mm256_castpd_ps(pairs[i + 4]);
    a[i] = _mm256_permute2f128_ps(top, bottom, 0x20), a[i + 4] = _mm256_permute2f128_ps(top, bottom, 0x31);
  }
}

// A pair holds 2 * kLanes elements, in an order of its own for each dtype: loads and stores agree on it.
struct Pair {
  Vec a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + 8)}; }
inline void store_pair(float* p, Pair v) { store(p, v.a), store(p + 8, v.b); }

inline Pair load_pair(const bfloat16* p) {
  // Elements 0, 2, 4 ... and 1, 3, 5 ...: half the work of widening them in order.
  const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))))};
}
inline __m256i rounded(Vec v) {  // To the nearest bfloat16, ties to even, in the upper half of each lane.
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline void store_pair(bfloat16* p, Pair v) {
  _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(_mm256_srli_epi32(rounded(v.a), 16), rounded(v.b), 0xaa));
}

inline Pair load_pair(const float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_pair(float16* p, Pair v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

inline Pair load_pair(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes)))};
}
inline Pair load_pair(const float8* p) {
  // The sign stands in bits 7 to 15, the rest below: shifted, all but bit 14 are those of a float16, of 1 / 256.
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(int16_t(0xbfff)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

// kLanes numbers in their order.
inline Vec load_lanes(const float* p) { return load(p); }
inline Vec load_lanes(const bfloat16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
inline Vec load_lanes(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// Of two lanes kStride apart the first becomes their sum, the second their difference.
template <int kStride>
inline Vec butterfly(Vec v) {
  const Vec other = kStride == 1   ? _mm256_permute_ps(v, 0xb1)
                    : kStride == 2 ? _mm256_permute_ps(v, 0x4e)
                                   : _mm256_permute2f128_ps(v, v, 1);
  constexpr int kSecond = kStride == 1 ? 0xaa : kStride == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(v + other, other - v, kSecond);
}

template <class T>
inline Pair load_pair(const T* p, int n) {  // n elements, zeros after them.
  T whole[2 * kLanes] = {};
  memcpy(whole, p, n * sizeof(T));
  return load_pair(whole);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
