// Attention over int8 codes by dot products of bytes (VNNI), which are exact. What meets the codes, a query or the
// weights of a tile, becomes integers of two bytes, or of three for float32, with one scale.
#pragma once
#include "codes.h"
#include "decode_tiles.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Codes of P are multiplied as bytes, by ByteDot<P>.
template <class P>
constexpr bool kInBytes = false;
template <class P>
struct ByteDot;

// Bytes of the integers that meet codes.
inline int parts_for(Dtype dtype) { return dtype == Dtype::kFloat32 ? 3 : 2; }

#ifdef __AVX512VNNI__
template <>
inline constexpr bool kInBytes<int8_t> = true;

// sums + a . b, of words of four bytes, unsigned in `a`, signed in `b`. For its intrinsic GCC copies each sum to
// memory.
inline __m512i add_dots(__m512i sums, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}
// The same with one word for all of `b`.
inline __m512i add_dots(__m512i sums, __m512i a, const int32_t* b) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(a), "m"(*b));
  return sums;
}

// A query as signed bytes [parts][words * 4], each part counting 128 times as much as the next. Keys are biased by 128
// to be unsigned: a part's sums begin at what takes that from them, its `starts`. Returns the size of the last part's
// steps.
inline float split_query(const float* query, int dim, int parts, int32_t* bytes, int32_t* starts) {
  const int words = padded(dim) / 4;
  const float steps = parts == 3 ? 127 * 128 * 128 : 127 * 128, most = largest_size(query, dim);
  const float step = most == 0 ? 1 : most / steps;
  __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int d = 0; d < padded(dim); d += kLanes) {
    __m512i left = _mm512_cvtps_epi32(load(query + d) / splat(step));
    for (int p = parts - 1; p >= 0; --p) {
      const __m512i above = p > 0 ? _mm512_srai_epi32(_mm512_add_epi32(left, _mm512_set1_epi32(64)), 7) : left;
      const __m512i part = p > 0 ? _mm512_sub_epi32(left, _mm512_slli_epi32(above, 7)) : left;
      _mm_storeu_si128((__m128i*)(bytes + p * words + d / 4), _mm512_cvtepi32_epi8(part));
      sums[p] = _mm512_add_epi32(sums[p], part);
      left = above;
    }
  }
  for (int p = 0; p < parts; ++p) starts[p] = -128 * _mm512_reduce_add_epi32(sums[p]);
  return step;
}

inline __mmask64 first_bytes(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// Four tokens' codes side by side: dword i in quarter q of v[j] holds element 16 * q + 4 * j + i of each.
HF_PAGED_INLINE inline void interleave(__m512i (&v)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(v[0], v[1]), high01 = _mm512_unpackhi_epi8(v[0], v[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(v[2], v[3]), high23 = _mm512_unpackhi_epi8(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi16(low01, low23), v[1] = _mm512_unpackhi_epi16(low01, low23);
  v[2] = _mm512_unpacklo_epi16(high01, high23), v[3] = _mm512_unpackhi_epi16(high01, high23);
}

template <>
struct ByteDot<int8_t> {
  using Query = int32_t;

  // [parts][words], then the size of a step and the starts of the parts: not more than padded(dim) words.
  static void keep(const float* query, int dim, int parts, Query* kept) {
    Query* rest = kept + parts * (padded(dim) / 4);
    const float step = split_query(query, dim, parts, kept, rest + 1);
    memcpy(rest, &step, sizeof step);
  }

  // Scores of `group` queries, each `stride` words from the last, over the tokens of a tile: [group, kMaxTile].
  template <int kParts>
  static void score(const Tile<int8_t>& tile, const Tile<int8_t>& ahead, const Query* queries, int stride, int group,
                    int dim, float* scores) {
    alignas(64) __m512i keys[kMaxHeadDim / 4];
    for (int t = 0; t < tile.tokens; t += kLanes) {
      turn_keys(tile.keys + t, dim, keys);
      for (int h = 0; h < group; h += 4) {
        const Query* some = queries + h * stride;
        float* to = scores + h * kMaxTile + t;
        const int8_t* next = h == 0 ? ahead.keys[t] : nullptr;
        const int heads = group - h;
        if (heads >= 4) dots<kParts, 4>(keys, some, stride, dim, next, to);
        if (heads == 3) dots<kParts, 3>(keys, some, stride, dim, next, to);
        if (heads == 2) dots<kParts, 2>(keys, some, stride, dim, next, to);
        if (heads == 1) dots<kParts, 1>(keys, some, stride, dim, next, to);
      }
    }
  }

  // Word w of `turned`: elements 4 * w and on of kLanes keys, as unsigned bytes.
  static void turn_keys(const int8_t* const* keys, int dim, __m512i* turned) {
    for (int d = 0; d < dim; d += 64) {
      const __mmask64 mask = first_bytes(dim - d);
      Vec rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, keys[i] + d));
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        turned[d / 4 + i] = _mm512_xor_si512(_mm512_castps_si512(rows[i]), _mm512_set1_epi8(-128));
    }
  }

  // A word of kLanes keys is a line: while at it, brings as many of the keys at `ahead` near, unless that is null.
  template <int kParts, int kHeads>
  static void dots(const __m512i* keys, const Query* queries, int stride, int dim, const int8_t* ahead, float* scores) {
    const int words = padded(dim) / 4;
    const Query* rest = queries + kParts * words;
    __m512i sums[kHeads][kParts];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) sums[h][p] = _mm512_set1_epi32(rest[h * stride + 1 + p]);
    for (int w = 0; w < (dim + 3) / 4; ++w) {
      const __m512i key = keys[w];
      if (ahead) prefetch(ahead + w * 64, 64);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 3
        for (int p = 0; p < kParts; ++p)
          sums[h][p] = add_dots(sums[h][p], key, queries + h * stride + p * words + w);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      Vec score = _mm512_cvtepi32_ps(sums[h][0]);
#pragma GCC unroll 3
      for (int p = 1; p < kParts; ++p) score = fma(score, splat(128), _mm512_cvtepi32_ps(sums[h][p]));
      float step;
      memcpy(&step, rest + h * stride, sizeof step);
      store(scores + h * kMaxTile, score * splat(step));
    }
  }

  // The weights of up to kMaxTile tokens become unsigned bytes [parts][kMaxTile], in their place. Returns the size of a
  // step of the last part.
  static float split_weights(float* weights, int tokens, int parts) {
    const Vec zero = splat(0);
    Vec w[kMaxTile / kLanes], most = zero, zeros = zero;
#pragma GCC unroll 4
    for (int i = 0; i < kMaxTile / kLanes; ++i) {
      w[i] = i * kLanes < tokens ? load(weights + i * kLanes) : zero;
      most = max(most, w[i]), zeros = fma(w[i], zero, zeros);
    }
    const float steps = parts == 3 ? 0xffff00 : 0xffff, largest = max_lane(most);
    const Vec per_weight = splat(largest > 0 ? steps / largest : 0);
    uint8_t* bytes = (uint8_t*)weights;
#pragma GCC unroll 4
    for (int i = 0; i < kMaxTile / kLanes; ++i) {
      __m512i whole = _mm512_cvtps_epi32(w[i] * per_weight);
      for (int p = parts - 1; p >= 0; --p, whole = _mm512_srli_epi32(whole, 8))
        _mm_storeu_si128((__m128i*)(bytes + p * kMaxTile + i * kLanes), _mm512_cvtepi32_epi8(whole));
    }
    return largest / steps + sum_lanes(zeros);  // NaN if a weight, by its scale, is not finite.
  }

  // acc[h] = acc[h] * factors[h] + weights[h] . values, for `group` heads; acc is in the order of `interleave`.
  template <int kParts>
  static void add(const Tile<int8_t>& tile, const Tile<int8_t>& ahead, int group, int dim, const float* weights,
                  const float* factors, const float* steps, float* acc, int stride) {
    constexpr int kMost = kParts == 3 ? 2 : 3;  // Heads whose sums the registers hold.
    for (int h = 0; h < group; h += kMost) {
      const float* of_heads = weights + h * kMaxTile;
      float* sums = acc + h * stride;
      const int heads = group - h;
      if (heads >= kMost)
        add_heads<kParts, kMost>(tile, ahead, h == 0, dim, of_heads, factors + h, steps + h, sums, stride);
      else if (heads == 2)
        add_heads<kParts, 2>(tile, ahead, h == 0, dim, of_heads, factors + h, steps + h, sums, stride);
      else
        add_heads<kParts, 1>(tile, ahead, h == 0, dim, of_heads, factors + h, steps + h, sums, stride);
    }
  }

  template <int kParts, int kHeads>
  static void add_heads(const Tile<int8_t>& tile, const Tile<int8_t>& ahead, bool prefetches, int dim,
                        const float* weights, const float* factors, const float* steps, float* acc, int stride) {
    // What is ahead is asked for in the order of memory: four lines of four values at a time.
    const int parts = (dim + 63) / 64;
    int token = prefetches ? 0 : tile.tokens, part = 0;
    for (int d = 0; d < dim; d += 64) {
      const __mmask64 mask = first_bytes(dim - d);
      __m512i sums[kHeads][kParts][4];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 3
        for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sums[h][p][j] = _mm512_setzero_si512();
      const char* bytes = (const char*)weights;
      for (int t = 0; t < tile.tokens; t += 4, bytes += 4) {
        __m512i value[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) value[i] = _mm512_maskz_loadu_epi8(mask, tile.values[t + i] + d);
        if (token < tile.tokens) {
#pragma GCC unroll 4
          for (int line = 0; line < 4; ++line) prefetch(ahead.values[token] + part * 256 + line * 64, 64);
          if (++part == parts) part = 0, token += 4;
        }
        interleave(value);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 3
          for (int p = 0; p < kParts; ++p) {
            int32_t four;
            memcpy(&four, bytes + h * kMaxTile * sizeof(float) + p * kMaxTile, sizeof four);
            const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[h][p][j] = add_dots(sums[h][p][j], weight, value[j]);
          }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Vec sum = _mm512_cvtepi32_ps(sums[h][0][j]);
#pragma GCC unroll 3
          for (int p = 1; p < kParts; ++p) sum = fma(sum, splat(256), _mm512_cvtepi32_ps(sums[h][p][j]));
          float* at = acc + h * stride + d + j * kLanes;
          store(at, fma(load(at), splat(factors[h]), sum * splat(steps[h])));
        }
    }
  }

  // Brings the elements of one head's sums into their order.
  static void put_in_order(float* acc, int dim) {
    for (int d = 0; d < dim; d += 64, acc += 64) {
      float ordered[64];
      for (int j = 0; j < 4; ++j)
        for (int q = 0; q < 4; ++q) memcpy(ordered + 16 * q + 4 * j, acc + 16 * j + 4 * q, 4 * sizeof(float));
      memcpy(acc, ordered, sizeof ordered);
    }
  }
};
#endif

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
