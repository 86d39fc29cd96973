// Attention of single queries: each key and value is read once for all the query heads that share it.
#pragma once
#include <cmath>
#include <cstring>

#include "bytes.h"
#include "decode_tiles.h"
#include "dot.h"
#include "exponential.h"
#include "finish.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// acc[h] = acc[h] * factors[h] + weights[h] . values, for kHeads heads and kPairs pairs of value elements from d.
// `count`: elements of the last pair. Prefetches as many elements of the values of `ahead` if kPrefetch.
template <class T, int kHeads, int kPairs, bool kPrefetch>
inline void add_values(const T* const* values, const T* const* ahead, int d, int dim, int tokens, int count,
                       const float* weights, const float* factors, float* acc, int stride) {
  Vec sums[kHeads][2 * kPairs];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kPairs; ++i) sums[h][i] = load(acc + h * stride + i * kLanes) * splat(factors[h]);
  // The calls for the parts of a value share the lines of `ahead` out in the order of memory.
  constexpr int kPart = kPairs * kPairLanes;
  const int parts = dim > kPart ? dim / kPart : 1, done = d / kPart * tokens;
  int next = done / parts, part = done % parts;
  for (int t = 0; t < tokens; ++t) {
    if (kPrefetch && next < tokens) {
      prefetch(ahead[next] + part * kPart, kPart * sizeof(T));
      if (++part == parts) part = 0, ++next;
    }
    Pair value[kPairs];
#pragma GCC unroll 2
    for (int i = 0; i < kPairs; ++i) {
      const T* element = values[t] + d + i * kPairLanes;
      value[i] = kPairs == 1 && count < kPairLanes ? load_pair(element, count) : load_pair(element);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = splat(weights[h * kMaxTile + t]);
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        sums[h][2 * i] = fma(weight, value[i].a, sums[h][2 * i]);
        sums[h][2 * i + 1] = fma(weight, value[i].b, sums[h][2 * i + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kPairs; ++i) store(acc + h * stride + i * kLanes, sums[h][i]);
}

template <class T>
class Decoder {
 public:
  Decoder(const Attention& a, Plan& plan, float* scratch)
      : a_(a),
        plan_(plan),
        group_(a.group()),
        key_stride_(padded(a.keys.head_dim)),
        stride_(acc_stride(a)) {
    scores_ = scratch, scratch += group_ * kMaxTile;
    factors_ = scratch, scratch += padded(group_);
    steps_ = scratch, scratch += padded(group_);
    states_ = scratch;
  }

  void run() {
    TileWalk<T> walk(a_, plan_);
    Tile<T> tiles[2];
    int now = 0;
    if (!walk.next(tiles[now])) return;
    for (bool more = true; more; now = 1 - now) {
      more = walk.next(tiles[1 - now]);
      const Tile<T>&tile = tiles[now], &ahead = more ? tiles[1 - now] : tile;
      turn_to(tile.kv_head);
      if (tile.is_first) begin(tile);
      if constexpr (kIsCode<T>)
        read_scales(a_, tile.table, tile.kv_head, tile.start, tile.tokens, kMaxTile, kUnit<T>, key_scales_,
                    value_scales_);
      score(tile, ahead);
      weigh(tile.tokens);
      add(tile, ahead);
      if (tile.is_last) end(tile);
    }
  }

 private:
  using Query = typename std::conditional_t<kInBytes<T>, ByteDot<T>, Dot<T>>::Query;

  const DecodeQuery& query_of(const Tile<T>& tile) const { return plan_.decodes[plan_.chunk_owner[tile.chunk]]; }

  // The KV heads of a chunk take turns: each has a state of its own.
  void turn_to(int kv_head) {
    float* state = states_ + kv_head * state_floats(a_);
    queries_ = (Query*)state, state += group_ * key_stride_;
    acc_ = state, state += group_ * stride_;
    max_ = state, state += padded(group_);
    sum_ = state;
  }

  void begin(const Tile<T>& tile) {
    for (int h = 0; h < group_; ++h) {
      begin_head(query_of(tile).token, tile.kv_head * group_ + h, queries_ + h * key_stride_);
      max_[h] = -INFINITY, sum_[h] = 0;
    }
    memset(acc_, 0, group_ * stride_ * sizeof(float));
  }

  void begin_head(int64_t token, int head, Query* kept) const {
    std::conditional_t<kIsCode<T>, float, T> query[kMaxHeadDim];
    if constexpr (kIsCode<T>)
      load_rotated_query(a_, token, head, query);
    else
      load_query(a_, token, head, query);
    if constexpr (kInBytes<T>)
      ByteDot<T>::keep(query, a_.keys.head_dim, parts_for(a_.dtype), kept);
    else
      Dot<T>::keep(query, a_.keys.head_dim, kept);
  }

  void score(const Tile<T>& tile, const Tile<T>& ahead) {
    if constexpr (kInBytes<T>) {
      const int dim = a_.keys.head_dim;
      if (a_.dtype == Dtype::kFloat32)
        ByteDot<T>::template score<3>(tile, ahead, queries_, key_stride_, group_, dim, scores_);
      else
        ByteDot<T>::template score<2>(tile, ahead, queries_, key_stride_, group_, dim, scores_);
    } else {
      score_lanes(tile, ahead);
    }
  }

  void score_lanes(const Tile<T>& tile, const Tile<T>& ahead) {
    int h = 0;
    for (; h + 4 <= group_; h += 4) score_heads<4>(tile, ahead, h);
    // Codes are widened once for three heads; other keys cost no more when they are loaded twice.
    if constexpr (kIsCode<T>)
      if (h + 3 == group_) return score_heads<3>(tile, ahead, h);
    if (h + 2 <= group_) score_heads<2>(tile, ahead, h), h += 2;
    if (h < group_) score_heads<1>(tile, ahead, h);
  }

  template <int kHeads>
  void score_heads(const Tile<T>& tile, const Tile<T>& ahead, int head) {
    constexpr int kTokens = kScoreTokens<kHeads>;
    const Query* queries = queries_ + head * key_stride_;
    for (int t = 0; t < tile.tokens; t += kTokens) {
      const Vec scores =
          head == 0 ? scores_of<T, kHeads, true>(tile.keys + t, ahead.keys + t, queries, key_stride_, a_.keys.head_dim)
                    : scores_of<T, kHeads, false>(tile.keys + t, nullptr, queries, key_stride_, a_.keys.head_dim);
      float lanes[kLanes];
      store(lanes, scores);
      for (int h = 0; h < kHeads; ++h)
        memcpy(scores_ + (head + h) * kMaxTile + t, lanes + h * kTokens, kTokens * sizeof(float));
    }
  }

  // Scores become weights 2^(score - maximum); the factors bring what was added before to the new maximum.
  void weigh(int tokens) {
    const int end = (tokens + 15) / 16 * 16;
    for (int h = 0; h < group_; ++h) {
      float* scores = scores_ + h * kMaxTile;
      Vec largest = splat(-INFINITY);
      for (int t = 0; t < end; t += kLanes)
        store(scores + t, to_log2(a_, of_codes(load(scores + t), key_scales_ + t)));
      for (int t = tokens; t < end; ++t) scores[t] = -INFINITY;
      for (int t = 0; t < end; t += kLanes) largest = max(largest, load(scores + t));
      const float before = max_[h], now = max_lane(largest);
      max_[h] = before > now ? before : now;
      factors_[h] = before - max_[h];
    }
    for (int h = 0; h < group_; h += kLanes) store(factors_ + h, exp2(load(factors_ + h)));
    for (int h = 0; h < group_; ++h) {
      float* scores = scores_ + h * kMaxTile;
      Vec sum = splat(0);
      for (int t = 0; t < end; t += kLanes) {
        const Vec weights = exp2(load(scores + t) - splat(max_[h]));
        sum = sum + weights;
        store(scores + t, of_codes(weights, value_scales_ + t));
      }
      sum_[h] = sum_[h] * factors_[h] + sum_lanes(sum);
      if constexpr (kInBytes<T>) steps_[h] = ByteDot<T>::split_weights(scores, tokens, parts_for(a_.dtype));
    }
  }

  static Vec of_codes(Vec numbers, const float* scales) { return kIsCode<T> ? numbers * load(scales) : numbers; }

  void add(const Tile<T>& tile, const Tile<T>& ahead) {
    if constexpr (kInBytes<T>) {
      const int dim = a_.values.head_dim;
      if (a_.dtype == Dtype::kFloat32)
        ByteDot<T>::template add<3>(tile, ahead, group_, dim, scores_, factors_, steps_, acc_, stride_);
      else
        ByteDot<T>::template add<2>(tile, ahead, group_, dim, scores_, factors_, steps_, acc_, stride_);
    } else {
      add_lanes(tile, ahead);
    }
  }

  void add_lanes(const Tile<T>& tile, const Tile<T>& ahead) {
    add_heads<4>(tile, ahead, 0, group_ / 4);
    const int rest = group_ % 4, head = group_ - rest;
    if (rest == 3) add_heads<3>(tile, ahead, head, 1);
    if (rest == 2) add_heads<2>(tile, ahead, head, 1);
    if (rest == 1) add_heads<1>(tile, ahead, head, 1);
  }

  template <int kHeads>
  void add_heads(const Tile<T>& tile, const Tile<T>& ahead, int head, int times) {
    for (; times > 0; --times, head += kHeads)
      if (head == 0)
        add_elements<kHeads, true>(tile, ahead, head);
      else
        add_elements<kHeads, false>(tile, ahead, head);
  }

  template <int kHeads, bool kPrefetch>
  void add_elements(const Tile<T>& tile, const Tile<T>& ahead, int head) {
    constexpr int kPairs = kLanes == 16 ? 2 : 1;  // As many sums as the registers hold.
    const int dim = a_.values.head_dim;
    int d = 0;
    for (; d + kPairs * kPairLanes <= dim; d += kPairs * kPairLanes)
      add_values<T, kHeads, kPairs, kPrefetch>(tile.values, ahead.values, d, dim, tile.tokens, kPairLanes,
                                               scores_ + head * kMaxTile, factors_ + head, acc_ + head * stride_ + d,
                                               stride_);
    for (; d < dim; d += kPairLanes)
      add_values<T, kHeads, 1, kPrefetch>(tile.values, ahead.values, d, dim, tile.tokens, dim - d,
                                          scores_ + head * kMaxTile, factors_ + head, acc_ + head * stride_ + d,
                                          stride_);
  }

  void end(const Tile<T>& tile) {
    const DecodeQuery& query = query_of(tile);
    const int head = tile.kv_head * group_;
    if constexpr (kInBytes<T>)
      for (int h = 0; h < group_; ++h) ByteDot<T>::put_in_order(acc_ + h * stride_, a_.values.head_dim);
    if (query.num_chunks == 1) {
      for (int h = 0; h < group_; ++h) finish<T>(a_, query.token, head + h, max_[h], sum_[h], acc_ + h * stride_);
      return;
    }
    for (int h = 0; h < group_; ++h)
      keep_partial(a_, plan_, tile.chunk, head + h, max_[h], sum_[h], acc_ + h * stride_);
    int& left = plan_.chunks_left[plan_.chunk_owner[tile.chunk] * a_.num_kv_heads + tile.kv_head];
    if (__atomic_sub_fetch(&left, 1, __ATOMIC_ACQ_REL) == 0)
      for (int h = 0; h < group_; ++h) merge_partials<T>(a_, plan_, query, head + h, acc_);
  }

  const Attention& a_;
  Plan& plan_;
  const int group_, key_stride_, stride_;
  float* scores_;      // [group, kMaxTile]
  float* factors_;     // [group]
  float* steps_;       // [group], of weights that are multiplied as bytes.
  float* states_;      // [num_kv_heads, state_floats], each of what follows:
  Query* queries_;     // [group, padded key_dim]
  float* acc_;         // [group, padded value_dim], in the order of pairs.
  float *max_, *sum_;  // [group]
  float key_scales_[kMaxTile], value_scales_[kMaxTile];  // Of the tile, where keys and values are codes.
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
