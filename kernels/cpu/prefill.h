// Attention of many queries of a row at once: products of tiles of queries and tiles of keys.
#pragma once
#include "finish.h"
#include "pack.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

static_assert(kBlockRows <= kMostBlockRows, "tile_rows leaves no room for a block");

template <class T>
class Prefiller {
 public:
  Prefiller(const Attention& a, Plan& plan, float* scratch) : a_(a), plan_(plan), group_(a.group()) {
    key_stride_ = Pack<T>::depth(padded(a.keys.head_dim)), value_stride_ = padded(a.values.head_dim);
    const int rows = tile_rows(a);
    queries_ = scratch, scratch += rows * key_stride_;
    rows_ = scratch, scratch += (kTileKeys + 1) * key_stride_;
    keys_ = scratch, scratch += kTileKeys * key_stride_;
    values_ = scratch, scratch += kTileKeys * value_stride_;
    scores_ = scratch, scratch += rows * kTileKeys;
    acc_ = scratch, scratch += rows * value_stride_;
    max_ = scratch, scratch += rows;
    sum_ = scratch, scratch += rows;
    factors_ = scratch;
  }

  void run() {
    const int64_t units = int64_t(plan_.tiles.size()) * a_.num_kv_heads;
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&plan_.next_tile, 1, __ATOMIC_RELAXED);
      if (unit >= units) return;
      attend_tile(plan_.tiles[unit / a_.num_kv_heads], int(unit % a_.num_kv_heads));
    }
  }

 private:
  void attend_tile(const PrefillTile& tile, int kv_head) {
    begin(tile, kv_head);
    const int64_t end = tile.position + tile.num_queries;
    int64_t start = tile.position - a_.window + 1;
    for (start = start > 0 ? start : 0; start < end; start += kTileKeys) {
      const int tokens = int(end - start < kTileKeys ? end - start : kTileKeys);
      pack_tokens(tile.row, kv_head, start, tokens);
      multiply<typename Pack<T>::Mul, false>(queries_, key_stride_, keys_, kTileKeys, padded_rows_, kTileKeys,
                                             key_stride_, scores_, kTileKeys, factors_);
      weigh(tile, kv_head, start, tokens);
      multiply<typename Pack<T>::Mul, true, Pack<T>::kRests>(scores_, kTileKeys, values_, value_stride_, padded_rows_,
                                                             value_stride_, Pack<T>::depth(kTileKeys), acc_,
                                                             value_stride_, factors_);
    }
    for (int row = 0; row < rows_of_tile_; ++row)
      finish<T>(a_, tile.token + row / group_, kv_head * group_ + row % group_, max_[row], sum_[row],
                acc_ + row * value_stride_);
  }

  void begin(const PrefillTile& tile, int kv_head) {
    rows_of_tile_ = tile.num_queries * group_;
    padded_rows_ = (rows_of_tile_ + kBlockRows - 1) / kBlockRows * kBlockRows;
    memset(queries_, 0, padded_rows_ * key_stride_ * sizeof(float));
    memset(acc_, 0, padded_rows_ * value_stride_ * sizeof(float));
    for (int row = 0; row < padded_rows_; ++row) max_[row] = -INFINITY, sum_[row] = 0;
    for (int row = 0; row < rows_of_tile_; ++row) {
      T query[256];
      load_query(a_, tile.token + row / group_, kv_head * group_ + row % group_, query);
      Pack<T>::row(query, a_.keys.head_dim, queries_ + row * key_stride_);
    }
  }

  const T* token_in(const Pages& pages, int64_t row, int kv_head, int64_t position) const {
    const int64_t block = a_.block_tables[row * a_.table_stride + position / a_.block_size];
    return (const T*)pages.data + block * pages.block_stride + kv_head * pages.head_stride +
           position % a_.block_size * pages.head_dim;
  }

  // Tokens start .. start + tokens - 1 of the row; zeros stand for those past them, never what a slot may hold.
  void pack_tokens(int64_t row, int kv_head, int64_t start, int tokens) {
    const bool is_plain = Pack<T>::kIsPlain && a_.keys.head_dim % kPad == 0;
    const float* keys[kTileKeys];
    const T* values[kTileKeys] = {};
    for (int t = 0; t < tokens; ++t) {
      const T* key = token_in(a_.keys, row, kv_head, start + t);
      keys[t] = is_plain ? (const float*)key : rows_ + t * key_stride_;
      if (!is_plain) Pack<T>::row(key, a_.keys.head_dim, rows_ + t * key_stride_);
      values[t] = token_in(a_.values, row, kv_head, start + t);
    }
    float* zeros = rows_ + kTileKeys * key_stride_;
    if (tokens < kTileKeys) memset(zeros, 0, key_stride_ * sizeof(float));
    for (int t = tokens; t < kTileKeys; ++t) keys[t] = zeros;
    transpose_keys(keys, key_stride_, keys_);
    Pack<T>::values(values, a_.values.head_dim, value_stride_, values_);
  }

  // Scores become weights 2^(score - maximum); the factors bring what was added before to the new maximum.
  // While at it, brings the next tile's keys and values near.
  void weigh(const PrefillTile& tile, int kv_head, int64_t start, int tokens) {
    const int64_t ahead = start + kTileKeys, end = tile.position + tile.num_queries;
    // Scores that are no more than scaled are so when their exponentials are taken.
    const bool is_bent = a_.softcap != 0 || a_.scale <= 0;
    const float factor = is_bent ? 1 : a_.scale * kLog2E;
    for (int row = 0; row < padded_rows_; ++row) {
      if (row < kTileKeys && ahead + row < end)
        for (const Pages* pages : {&a_.keys, &a_.values})
          prefetch(token_in(*pages, tile.row, kv_head, ahead + row), pages->head_dim * sizeof(T));
      float* scores = scores_ + row * kTileKeys;
      const int64_t position = tile.position + row / group_;
      const int64_t first = position - a_.window + 1 - start, last = position + 1 - start;
      if (is_bent)
        for (int t = 0; t < kTileKeys; t += kLanes) store(scores + t, to_log2(a_, load(scores + t)));
      for (int t = 0; t < first && t < kTileKeys; ++t) scores[t] = -INFINITY;
      for (int t = last < tokens ? (last > 0 ? int(last) : 0) : tokens; t < kTileKeys; ++t) scores[t] = -INFINITY;
      Vec largest = load(scores);
      for (int t = kLanes; t < kTileKeys; t += kLanes) largest = max(largest, load(scores + t));
      const float before = max_[row], now = max_lane(largest) * factor;
      max_[row] = before > now ? before : now;
      // A row that has seen nothing yet has no maximum to subtract.
      factors_[row] = max_[row] == -INFINITY ? 0 : before - max_[row];
    }
    for (int row = 0; row < padded_rows_; row += kLanes) store(factors_ + row, exp2(load(factors_ + row)));
    for (int row = 0; row < padded_rows_; ++row) {
      float* scores = scores_ + row * kTileKeys;
      const Vec shift = splat(max_[row] == -INFINITY ? 0 : -max_[row]);
      Vec sum = splat(0);
      Vec weights[kTileKeys / kLanes];
      for (int i = 0; i < kTileKeys / kLanes; ++i) {
        weights[i] = exp2(fma(load(scores + i * kLanes), splat(factor), shift));
        sum = sum + weights[i];
      }
      for (int i = 0; i < kTileKeys / kLanes; i += 2) Pack<T>::weights(weights[i], weights[i + 1], scores, i * kLanes);
      sum_[row] = sum_[row] * factors_[row] + sum_lanes(sum);
    }
  }

  const Attention& a_;
  Plan& plan_;
  const int group_;
  int key_stride_, value_stride_;  // Words of a packed key, floats of a padded value.
  int rows_of_tile_, padded_rows_;
  float* queries_;                // [rows, key_stride]; row = query * group + head of the group.
  float* rows_;                   // [kTileKeys, key_stride], and a row of zeros.
  float* keys_;                   // [key_stride, kTileKeys]
  float* values_;                 // [depth(kTileKeys), value_stride]
  float* scores_;                 // [rows, kTileKeys]; then the weights.
  float* acc_;                    // [rows, value_stride]
  float *max_, *sum_, *factors_;  // [rows]
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
