// What stands at both ends of decoding and prefill: queries in, outputs out, partial results merged.
#pragma once
#include "codes.h"
#include "exponential.h"
#include "plan.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// One query of one head, side by side.
template <class T>
inline void load_query(const Attention& a, int64_t token, int head, T* to) {
  const T* from = (const T*)a.query + token * a.query_strides[0] + head * a.query_strides[1];
  for (int d = 0; d < a.keys.head_dim; ++d) to[d] = from[d * a.query_strides[2]];
}

// The same for keys that are codes: floats, rotated as those are, zeros up to the padded size.
inline void load_rotated_query(const Attention& a, int64_t token, int head, float* to) {
  load_floats(a.dtype, a.query, token * a.query_strides[0] + head * a.query_strides[1], a.query_strides[2],
              a.keys.head_dim, to);
  rotate(to, a.keys.head_dim);
}

// Dot products become scores, in units of log 2.
inline Vec to_log2(const Attention& a, Vec dots) {
  if (a.softcap == 0) return dots * splat(a.scale * kLog2E);
  return tanh(dots * splat(a.scale / a.softcap)) * splat(a.softcap * kLog2E);
}

inline float exp2(float x) {
  float lanes[kLanes];
  store(lanes, exp2(splat(x)));
  return lanes[0];
}

// Numbers in their order, as a pair of T.
template <class T>
inline Pair in_pair_order(const float* p) {
  if constexpr (!std::is_same_v<T, bfloat16>) return {load(p), load(p + kLanes)};
  float even[kLanes], odd[kLanes];
  for (int i = 0; i < kLanes; ++i) even[i] = p[2 * i], odd[i] = p[2 * i + 1];
  return {load(even), load(odd)};
}

// Output of one query head: acc * scale. `acc` is in the order of pairs of T, or in that of the elements for codes.
template <class T, bool kIsInOrder>
inline void write_out(const Attention& a, int64_t token, int head, Vec scale, const float* acc) {
  const int dim = a.values.head_dim;
  T* out = (T*)a.out + (token * a.num_heads + head) * dim;
  for (int d = 0; d < dim; d += kPairLanes) {
    const Pair sums = kIsInOrder ? in_pair_order<T>(acc + d) : Pair{load(acc + d), load(acc + d + kLanes)};
    const Pair pair = {sums.a * scale, sums.b * scale};
    if (d + kPairLanes <= dim) {
      store_pair(out + d, pair);
    } else {
      T whole[kPairLanes];
      store_pair(whole, pair);
      memcpy(out + d, whole, (dim - d) * sizeof(T));
    }
  }
}

// Output of one query head: acc / sum, the head's sink taken in.
template <class P>
inline void finish(const Attention& a, int64_t token, int head, float max, float sum, const float* acc) {
  float factor = 1;
  if (a.sinks) {
    const float sink = a.sinks[head] * kLog2E, largest = max > sink ? max : sink;
    factor = exp2(max - largest);
    sum = sum * factor + exp2(sink - largest);
  }
  const Vec scale = splat(factor / sum);
  if constexpr (!kIsCode<P>) return write_out<P, false>(a, token, head, scale, acc);
  if (a.dtype == Dtype::kFloat32) return write_out<float, true>(a, token, head, scale, acc);
  if (a.dtype == Dtype::kBFloat16) return write_out<bfloat16, true>(a, token, head, scale, acc);
  write_out<float16, true>(a, token, head, scale, acc);
}

inline float* partial_of(const Attention& a, Plan& plan, int64_t chunk, int head) {
  return plan.partials.get() + (chunk * a.num_heads + head) * partial_floats(a);
}

inline void keep_partial(const Attention& a, Plan& plan, int64_t chunk, int head, float max, float sum,
                         const float* acc) {
  float* partial = partial_of(a, plan, chunk, head);
  partial[0] = max, partial[1] = sum;
  memcpy(partial + 2, acc, padded(a.values.head_dim) * sizeof(float));
}

// Merges the chunks of one query head in their order, from whatever threads they come.
template <class T>
inline void merge_partials(const Attention& a, Plan& plan, const DecodeQuery& query, int head, float* acc) {
  const int stride = padded(a.values.head_dim);
  float largest = -INFINITY, sum = 0;
  for (int64_t i = 0; i < query.num_chunks; ++i) {
    const float max = partial_of(a, plan, query.first_chunk + i, head)[0];
    largest = max > largest ? max : largest;
  }
  for (int64_t i = 0; i < query.num_chunks; ++i) {
    const float* partial = partial_of(a, plan, query.first_chunk + i, head);
    const float factor = exp2(partial[0] - largest);
    sum += partial[1] * factor;
    for (int d = 0; d < stride; d += kLanes) {
      const Vec share = load(partial + 2 + d) * splat(factor);
      store(acc + d, i == 0 ? share : load(acc + d) + share);
    }
  }
  finish<T>(a, query.token, head, largest, sum, acc);
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
