// Vectors of 4 floats in the compilers' portable vector types: SSE2, NEON or whatever the processor has.
#pragma once
#include <cmath>
#include <cstring>

#include "attention.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 pairs are taken apart as little-endian words"
#endif

namespace hf_paged {
namespace HF_PAGED_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;

template <class To, class From>
inline To load_as(const From* p) {
  To v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  const Ints less = a < b;
  return (Vec)(((Ints)yes & less) | ((Ints)no & ~less));
}
inline Vec max(Vec a, Vec b) { return where_less(a, b, b, a); }
inline float max_lane(Vec v) { return fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])); }
inline float sum_lanes(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
// Adding 1.5 * 2^23 leaves no bits for a fraction: good for |v| < 2^22.
inline Vec round(Vec v) { return (v + 12582912.0f) - 12582912.0f; }
// p * 2^n for an integral n <= 127; 0 below the range of normal floats.
inline Vec times_power_of_2(Vec p, Vec n) {
  const Vec biased = n + (12582912.0f + 127.0f);  // The integer stands in the low bits of the sum.
  const Vec power = (Vec)((Ints)biased << 23);
  return where_less(n, splat(-126.0f), splat(0), p * power);
}

// Lane i is the sum of a[i].
inline Vec sum_each(const Vec (&a)[4]) {
  return Vec{sum_lanes(a[0]), sum_lanes(a[1]), sum_lanes(a[2]), sum_lanes(a[3])};
}

// Rows become columns.
inline void transpose(Vec (&a)[4]) {
  const Vec b[4] = {a[0], a[1], a[2], a[3]};
  for (int i = 0; i < 4; ++i) a[i] = Vec{b[0][i], b[1][i], b[2][i], b[3][i]};
}

// A pair holds 2 * kLanes elements, in an order of its own for each dtype: loads and stores agree on it.
struct Pair {
  Vec a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + 4)}; }
inline void store_pair(float* p, Pair v) { store(p, v.a), store(p + 4, v.b); }

inline Pair load_pair(const bfloat16* p) {
  // Elements 0, 2, 4, 6 and 1, 3, 5, 7: half the work of widening them in order.
  const Bits bits = load_as<Bits>(p);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}
inline Bits rounded(Vec v) {  // To the nearest bfloat16, ties to even, in the upper half of each lane.
  const Bits bits = (Bits)v, sum = bits + 0x7fffu + ((bits >> 16) & 1u), is_nan = (Bits)(v != v);
  return (sum & ~is_nan) | (0x7fc00000u & is_nan);
}
inline void store_pair(bfloat16* p, Pair v) {
  const Bits bits = (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u);
  memcpy(p, &bits, sizeof bits);
}

inline float widen(float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // The exponents' biases differ by 112; subnormals come out right as well.
  memcpy(&bits, &value, sizeof bits);
  bits |= (magnitude >= 0x7c00u ? 0x7f800000u : 0) | (uint32_t(x.bits & 0x8000u) << 16);
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float16 narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // Rounds past the largest half.
  if (magnitude < 0x38800000u) {  // Subnormal: let the addition of 0.5 round to units of 2^-24.
    const float shifted = fabsf(value) + 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}
inline Pair load_pair(const float16* p) {
  return {Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])},
          Vec{widen(p[4]), widen(p[5]), widen(p[6]), widen(p[7])}};
}
inline void store_pair(float16* p, Pair v) {
  for (int i = 0; i < 4; ++i) p[i] = narrow(v.a[i]), p[4 + i] = narrow(v.b[i]);
}

inline Vec load_codes(const int8_t* p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline Vec load_codes(const float8* p) {
  const Ints codes = {int8_t(p[0].bits), int8_t(p[1].bits), int8_t(p[2].bits), int8_t(p[3].bits)};
  // The sign and, as those of a float, four bits of exponent and three of mantissa; biases differ by 120.
  return (Vec)((codes << 20) & int32_t(0x87f00000)) * 0x1p112f;
}
// Codes in their order, in units of kUnit.
inline Pair load_pair(const int8_t* p) { return {load_codes(p), load_codes(p + 4)}; }
inline Pair load_pair(const float8* p) { return {load_codes(p), load_codes(p + 4)}; }

// kLanes numbers in their order.
inline Vec load_lanes(const float* p) { return load(p); }
inline Vec load_lanes(const bfloat16* p) {
  return (Vec)(Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
inline Vec load_lanes(const float16* p) { return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }

// Of two lanes kStride apart the first becomes their sum, the second their difference.
template <int kStride>
inline Vec butterfly(Vec v) {
  if (kStride == 1) return Vec{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
  return Vec{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
}

template <class T>
inline Pair load_pair(const T* p, int n) {  // n elements, zeros after them.
  T whole[2 * kLanes] = {};
  memcpy(whole, p, n * sizeof(T));
  return load_pair(whole);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
