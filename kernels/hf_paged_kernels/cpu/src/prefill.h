// Attention of many queries of a row at once: products of tiles of queries and tiles of keys. Queries stand side by
// side in the vectors, so that no maximum and no sum crosses lanes, and keys are read where they lie.
#pragma once
#include "finish.h"
#include "pack.h"
#ifdef __AVX512BF16__
#include "pack_bf16.h"
#endif
#ifdef __AVX512VNNI__
#include "pack_bytes.h"
#endif
#include "tokens.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

template <class T, class Packing = std::conditional_t<kIsCode<T>, CodePack<T>, Pack<T>>>
class Prefiller {
 public:
  Prefiller(const Attention& a, Plan& plan, float* scratch) : a_(a), plan_(plan), group_(a.group()) {
    words_ = Packing::depth(padded(a.keys.head_dim)), value_dim_ = padded(a.values.head_dim);
    value_stride_ = stride_of(value_dim_);
    const int stride = stride_of(queries_per_tile(a) * group_);
    queries_ = scratch, scratch += words_ * stride;
    keys_ = scratch, scratch += (kTileKeys + 1) * words_;
    values_ = scratch, scratch += kTileKeys * value_stride_;
    scores_ = scratch, scratch += kTileKeys * stride;
    acc_ = scratch, scratch += value_dim_ * stride;
    max_ = scratch, scratch += stride;
    sum_ = scratch, scratch += stride;
    factors_ = scratch, scratch += stride;
    rest_scales_ = scratch, scratch += stride;
    places_ = scratch, scratch += stride;
    if constexpr (kBytes) query_steps_ = scratch, starts_[0] = scratch + stride, starts_[1] = scratch + 2 * stride;
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
  using Mul = typename Packing::Mul;
  static constexpr bool kBytes = kPacksBytes<Packing>;

  struct KeyTile {
    const T* keys[kTileKeys];
    const T* values[kTileKeys];
    int64_t start;
    int tokens;
  };

  void attend_tile(const PrefillTile& tile, int kv_head) {
    begin(tile, kv_head);
    // What a longer window shows lies before the first token.
    window_ = a_.window < tile.position + tile.num_queries ? a_.window : tile.position + tile.num_queries;
    KeyTile tiles[2];
    int now = 0;
    find(tile, kv_head, tile.position < window_ ? 0 : tile.position - window_ + 1, tiles[now]);
    for (; tiles[now].tokens > 0; now = 1 - now) {
      KeyTile &keys = tiles[now], &ahead = tiles[1 - now];
      find(tile, kv_head, keys.start + kTileKeys, ahead);
      if constexpr (kIsCode<T>) find_scales(tile, kv_head, keys);
      score(keys);
      weigh(tile, keys.start);
      add(keys, ahead);
    }
    end(tile, kv_head);
  }

  void begin(const PrefillTile& tile, int kv_head) {
    num_rows_ = tile.num_queries * group_;
    columns_ = (num_rows_ + kLanes - 1) / kLanes * kLanes;
    stride_ = stride_of(columns_);
    memset(acc_, 0, value_dim_ * stride_ * sizeof(float));
    for (int row = 0; row < columns_; ++row) max_[row] = kLowest, sum_[row] = 0, places_[row] = float(row / group_);
    for (int row = 0; row < columns_; row += kLanes) {
      float packed[kLanes * 256];
      for (int i = 0; i < kLanes; ++i) {
        const int which = row + i < num_rows_ ? row + i : num_rows_ - 1;
        pack_query(tile.token + which / group_, kv_head * group_ + which % group_, row + i, packed + i * words_);
      }
      for (int w = 0; w < words_; w += kLanes) turn(packed + w, words_, kLanes, queries_ + w * stride_ + row, stride_);
    }
  }

  void pack_query(int64_t token, int head, int column, float* to) {
    std::conditional_t<kIsCode<T>, float, T> query[kMaxHeadDim];
    if constexpr (kIsCode<T>)
      load_rotated_query(a_, token, head, query);
    else
      load_query(a_, token, head, query);
    if constexpr (kBytes) {
      int32_t starts[2];
      query_steps_[column] = Packing::query(query, a_.keys.head_dim, to, starts);
      for (int i = 0; i < 2; ++i) memcpy(starts_[i] + column, &starts[i], sizeof(float));
    } else {
      Packing::row(query, a_.keys.head_dim, to);
    }
  }

  void find_scales(const PrefillTile& tile, int kv_head, const KeyTile& keys) {
    read_scales(a_, a_.block_tables + tile.row * a_.table_stride, kv_head, keys.start, keys.tokens, kTileKeys,
                kUnit<T>, key_scales_, value_scales_);
    if constexpr (kBytes) value_scale_ = largest_size(value_scales_, kTileKeys);
  }

  void find(const PrefillTile& tile, int kv_head, int64_t start, KeyTile& found) const {
    const int64_t left = tile.position + tile.num_queries - start;
    found.start = start, found.tokens = int(left < kTileKeys ? left : kTileKeys);
    find_tokens(a_, a_.block_tables + tile.row * a_.table_stride, kv_head, start, found.tokens, found.keys,
                found.values);
  }

  void score(const KeyTile& tile) {
    const bool is_plain = !kIsCode<T> && Packing::kIsPlain && a_.keys.head_dim % kPad == 0;
    const float* rows[kTileKeys];
    for (int t = 0; t < tile.tokens; ++t) {
      rows[t] = is_plain ? (const float*)tile.keys[t] : keys_ + t * words_;
      if constexpr (kBytes)
        Packing::row(tile.keys[t], a_.keys.head_dim, keys_ + t * words_);
      else if constexpr (kIsCode<T>)
        Packing::row(tile.keys[t], key_scales_[t], a_.keys.head_dim, keys_ + t * words_);
      else if (!is_plain)
        Packing::row(tile.keys[t], a_.keys.head_dim, keys_ + t * words_);
    }
    // Zeros stand for tokens past the last, never what a slot may hold.
    float* zeros = keys_ + kTileKeys * words_;
    if (tile.tokens < kTileKeys) memset(zeros, 0, words_ * sizeof(float));
    const int num_rows = (tile.tokens + kBlockRows - 1) / kBlockRows * kBlockRows;
    for (int t = tile.tokens; t < num_rows; ++t) rows[t] = zeros;
    if constexpr (kBytes) {
      const int words = words_ / 2;  // Of a key, and of each byte of a query's numbers.
      const float* lower = queries_ + words * stride_;
      const auto start = [&](auto& sums, int row, int column) HF_PAGED_INLINE {
        Packing::start_scores(sums, Rows{rows}.from(row), queries_, starts_, stride_, words, column);
      };
      multiply<Mul>(Rows{rows}, lower, stride_, num_rows, columns_, words, scores_, stride_, start);
    } else {
      multiply<Mul>(Rows{rows}, queries_, stride_, num_rows, columns_, words_, scores_, stride_,
                    [](auto& sums, int, int) HF_PAGED_INLINE { set_zero(sums); });
    }
  }

  // Scores become weights 2^(score - maximum); the factors bring what was added before to the new maximum.
  void weigh(const PrefillTile& tile, int64_t start) {
    // Scores that are no more than scaled are so when their exponentials are taken.
    const bool is_bent = a_.softcap != 0 || a_.scale <= 0;
    const int64_t last = tile.position + tile.num_queries - 1;
    const bool hides = start + kTileKeys - 1 > tile.position || start <= last - window_;
    const Vec factor = splat(is_bent ? 1 : a_.scale * kLog2E);
    for (int row = 0; row < columns_; row += kLanes) {
      float* scores = scores_ + row;
      if constexpr (kBytes)
        for (int t = 0; t < kTileKeys; ++t)
          Packing::scale_scores(scores + t * stride_, splat(key_scales_[t]) * load(query_steps_ + row));
      if (is_bent)
        for (int t = 0; t < kTileKeys; ++t) store(scores + t * stride_, to_log2(a_, load(scores + t * stride_)));
      if (hides) hide(tile.position - start, load(places_ + row), scores);
      const Vec of_tile = largest_of(scores) * factor;
      const Vec before = load(max_ + row), largest = max(before, of_tile);
      const Vec factors = exp2(before - largest), shift = splat(0) - largest;
      Vec rest_scale = splat(0);
      if (Packing::kRestSteps > 0) {
        const Vec most = exp2(of_tile - largest) * splat(kBytes ? value_scale_ : 1);
        rest_scale = splat(Packing::kRestSteps) / most;
        store(rest_scales_ + row, most * splat(1 / Packing::kRestSteps));
      }
      Vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
      for (int t = 0; t < kTileKeys; t += 4) {
        float* at = scores + t * stride_;
        Vec weights[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          weights[i] = exp2(fma(load(at + i * stride_), factor, shift));
          sums[i] = sums[i] + weights[i];
          if constexpr (kBytes) weights[i] = weights[i] * splat(value_scales_[t + i]);
        }
        Packing::weights(weights, rest_scale, at, stride_);
      }
      store(max_ + row, largest), store(factors_ + row, factors);
      // A tile is summed by itself: beside all that came before, small weights would be rounded away one by one.
      store(sum_ + row, fma(load(sum_ + row), factors, (sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
  }

  Vec largest_of(const float* scores) const {
    Vec largest[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) largest[i] = load(scores + i * stride_);
    for (int t = 4; t < kTileKeys; t += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) largest[i] = max(largest[i], load(scores + (t + i) * stride_));
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }

  // Hides from each query what it does not see. `position` is that of the tile's first query, counted from the first
  // key; `places` are those of the queries in the tile.
  void hide(int64_t position, Vec places, float* scores) const {
    const int64_t oldest = position - window_ + 1;  // What is far away is cut off: floats count exactly.
    const Vec first = places + splat(float(oldest > -kFar ? oldest : -kFar));
    const Vec last = places + splat(float(position < kFar ? position : kFar)), hidden = splat(-INFINITY);
    for (int t = 0; t < kTileKeys; ++t) {
      float* at = scores + t * stride_;
      const Vec at_last = where_less(last, splat(float(t)), hidden, load(at));
      store(at, where_less(splat(float(t)), first, hidden, at_last));
    }
  }

  // While at it, brings the next tile near.
  void add(const KeyTile& tile, const KeyTile& ahead) {
    const T* values[kTileKeys] = {};
    for (int t = 0; t < tile.tokens; ++t) values[t] = tile.values[t];
    if constexpr (kIsCode<T> && !kBytes)
      Packing::values(values, value_scales_, a_.values.head_dim, value_stride_, values_);
    else
      Packing::values(values, a_.values.head_dim, value_stride_, values_);
    constexpr int kColumns = kBlockVecs * kLanes;
    const int blocks = value_dim_ / kBlockRows * ((columns_ + kColumns - 1) / kColumns);
    const int per_block = (kTileKeys + blocks - 1) / blocks;
    const ValueProduct product = {values_, value_stride_, scores_, acc_, factors_, rest_scales_, stride_};
    int next = 0;
    const auto start = [&](auto& sums, int row, int column) HF_PAGED_INLINE {
      for (int i = 0; i < per_block && next < ahead.tokens; ++i, ++next) {
        prefetch(ahead.keys[next], a_.keys.head_dim * sizeof(T));
        prefetch(ahead.values[next], a_.values.head_dim * sizeof(T));
      }
      if constexpr (kBytes)
        Packing::start(sums, product, row, column, tile.tokens);
      else
        Packing::start(sums, product, row, column);
    };
    multiply<Mul>(Columns{values_, value_stride_}, scores_, Packing::kWeightRows * stride_, value_dim_, columns_,
                  kBytes ? 0 : Packing::depth((tile.tokens + 1) / 2 * 2), acc_, stride_, start);
  }

  void end(const PrefillTile& tile, int kv_head) {
    for (int begin = 0; begin < num_rows_; begin += kLanes) {
      float acc[kLanes * 256];
      turn(acc_ + begin, stride_, value_dim_, acc, value_dim_);
      for (int row = begin; row < begin + kLanes && row < num_rows_; ++row)
        finish<T>(a_, tile.token + row / group_, kv_head * group_ + row % group_, max_[row], sum_[row],
                  acc + (row - begin) * value_dim_);
    }
  }

  // The maximum of nothing: finite, so that it can be subtracted from scores of -infinity.
  static constexpr float kLowest = -3e38f;
  static constexpr int64_t kFar = 4096;  // More than the places and the keys of a tile.

  const Attention& a_;
  Plan& plan_;
  const int group_;
  int words_, value_dim_, value_stride_;  // Words of a packed key; floats of a padded value, from one to the next.
  int num_rows_, columns_, stride_;  // Of a tile: queries times heads; rounded up; from one row to the next.
  int64_t window_;
  // In the columns of matrices stand the queries of a tile, each with the heads of its group.
  float* queries_;                // [words, stride]
  float* keys_;                   // [kTileKeys, words], and a row of zeros.
  float* values_;                 // [depth(kTileKeys), value_stride], and what rests need
  float* scores_;                 // [kTileKeys, stride]; then the weights.
  float* acc_;                    // [value_dim, stride]
  float *max_, *sum_, *factors_, *rest_scales_;  // [stride]
  float* places_;                 // [stride]; a query's place in the tile.
  // Where keys and values are codes: the scales of the tile's tokens.
  float key_scales_[kTileKeys], value_scales_[kTileKeys];
  // Where these are packed as bytes: the largest scale of the values; of each query, the size of its steps and what the
  // sums of its bytes start at.
  float value_scale_;
  float *query_steps_, *starts_[2];  // [stride]
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
