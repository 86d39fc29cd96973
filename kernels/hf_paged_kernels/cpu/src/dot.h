// Dot products of queries with keys. Include after a vector_*.h.
#pragma once
#include "tokens.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

constexpr int kPairLanes = 2 * kLanes;

// How keys of dtype T meet a query: the query is kept as floats in the order of pairs of T.
template <class T>
struct Dot {
  using Query = float;
  using Key = Pair;

  // `query` is of the keys' dtype, or of floats for codes.
  template <class Q>
  static void keep(const Q* query, int dim, Query* kept) {
    for (int d = 0; d < dim; d += kPairLanes) {
      const Pair pair = load_pair(query + d, dim - d < kPairLanes ? dim - d : kPairLanes);
      store(kept + d, pair.a), store(kept + d + kLanes, pair.b);
    }
  }
  static Key load_key(const T* key) { return load_pair(key); }
  static Key load_key(const T* key, int n) { return load_pair(key, n); }
  static Vec add(Vec sum, const Query* query, Key key) {
    return fma(load(query + kLanes), key.b, fma(load(query), key.a, sum));
  }
};

#ifdef __AVX512BF16__
// Products of two bfloat16 are exact in a float: no widening is needed.
template <>
struct Dot<bfloat16> {
  using Query = bfloat16;
  using Key = __m512bh;

  static void keep(const bfloat16* query, int dim, Query* kept) {
    for (int d = 0; d < dim; d += kPairLanes)
      _mm512_storeu_si512(kept + d, _mm512_maskz_loadu_epi16(first_elements(dim - d), query + d));
  }
  static __mmask32 first_elements(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }
  static Key load_key(const bfloat16* key) { return (__m512bh)_mm512_loadu_si512(key); }
  static Key load_key(const bfloat16* key, int n) { return (__m512bh)_mm512_maskz_loadu_epi16(first_elements(n), key); }
  static Vec add(Vec sum, const Query* query, Key key) {
    return _mm512_dpbf16_ps(sum, key, (__m512bh)_mm512_loadu_si512(query));
  }
};
#endif

// The tokens whose scores for kHeads queries fill a vector; three queries leave a quarter of it.
template <int kHeads>
constexpr int kScoreTokens = kLanes / (kHeads == 3 ? 4 : kHeads);

// Scores of kHeads queries over kScoreTokens tokens, [kHeads, kScoreTokens] in one vector. While at it, brings the
// lines of `ahead`, as many other keys, near if kPrefetch.
template <class T, int kHeads, bool kPrefetch>
inline Vec scores_of(const T* const* keys, const T* const* ahead, const typename Dot<T>::Query* queries, int stride,
                     int dim) {
  constexpr int kTokens = kScoreTokens<kHeads>, kStep = kTokens < 4 ? kTokens : 4;
  const int whole = dim / kPairLanes * kPairLanes;
  Vec sums[kLanes];
#pragma GCC unroll 4
  for (int i = kHeads * kTokens; i < kLanes; ++i) sums[i] = splat(0);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t += kStep) {
    Vec part[kHeads * kStep];
#pragma GCC unroll 16
    for (int i = 0; i < kHeads * kStep; ++i) part[i] = splat(0);
    for (int d = 0; d < whole; d += kPairLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) {
        const typename Dot<T>::Key key = Dot<T>::load_key(keys[t + i] + d);
        // The tokens of a block lie side by side: its lines are asked for in the order of memory.
        if (kPrefetch && i * kPairLanes * sizeof(T) % 64 == 0)
          prefetch(ahead[t] + kStep * d + i * kPairLanes, kPairLanes * sizeof(T));
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h)
          part[h * kStep + i] = Dot<T>::add(part[h * kStep + i], queries + h * stride + d, key);
      }
    }
    if (whole < dim)
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) {
        const typename Dot<T>::Key key = Dot<T>::load_key(keys[t + i] + whole, dim - whole);
        if (kPrefetch) prefetch(ahead[t + i] + whole, kPairLanes * sizeof(T));
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h)
          part[h * kStep + i] = Dot<T>::add(part[h * kStep + i], queries + h * stride + whole, key);
      }
#pragma GCC unroll 16
    for (int i = 0; i < kHeads * kStep; ++i) sums[i / kStep * kTokens + t + i % kStep] = part[i];
  }
  return sum_each(sums);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
