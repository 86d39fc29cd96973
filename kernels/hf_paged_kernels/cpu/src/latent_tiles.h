// Absorbed attention over latents: products of tiles of queries, with all their heads, and tiles of latents. As in
// prefill.h queries stand side by side in the vectors. A latent is packed once, and is key and value of every head.
#pragma once
#include "finish.h"
#include "latent.h"
#include "pack.h"
#ifdef __AVX512BF16__
#include "pack_bf16.h"
#endif
#include "tokens.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

template <class T>
class LatentAttender {
 public:
  LatentAttender(const LatentAttention& call, Plan& plan, float* scratch)
      : a_(call.latents), ropes_(call.ropes), plan_(plan), group_(a_.group()) {
    rank_ = padded(a_.keys.head_dim), value_stride_ = stride_of(rank_);
    latent_words_ = Pack<T>::depth(rank_), rope_words_ = Pack<T>::depth(padded(ropes_.keys.head_dim));
    words_ = latent_words_ + rope_words_;
    const int stride = stride_of(queries_per_tile(a_) * group_);
    queries_ = scratch, scratch += words_ * stride;
    keys_ = scratch, scratch += (kTileKeys + 1) * (latent_words_ > rope_words_ ? latent_words_ : rope_words_);
    values_ = scratch, scratch += kTileKeys * value_stride_;
    scores_ = scratch, scratch += kTileKeys * stride;
    acc_ = scratch, scratch += rank_ * stride;
    lines_ = scratch, scratch += kLanes * (words_ > rank_ ? words_ : rank_);
    max_ = scratch, scratch += stride;
    sum_ = scratch, scratch += stride;
    factors_ = scratch, scratch += stride;
    rest_scales_ = scratch, scratch += stride;
    places_ = scratch;
  }

  void run() {
    const int64_t tiles = int64_t(plan_.tiles.size()) * a_.num_kv_heads;
    const int64_t chunks = int64_t(plan_.chunk_owner.size()) * a_.num_kv_heads;
    for (int64_t unit; (unit = __atomic_fetch_add(&plan_.next_tile, 1, __ATOMIC_RELAXED)) < tiles;)
      attend_tile(plan_.tiles[unit / a_.num_kv_heads], int(unit % a_.num_kv_heads));
    for (int64_t unit; (unit = __atomic_fetch_add(&plan_.next_chunk, 1, __ATOMIC_RELAXED)) < chunks;)
      attend_chunk(unit / a_.num_kv_heads, int(unit % a_.num_kv_heads));
  }

 private:
  using Mul = typename Pack<T>::Mul;

  // Queries of a row, with the heads of one group, and the tokens first .. last - 1 that they are to read.
  struct Unit {
    PrefillTile queries;
    int head;
    int64_t first, last;
  };

  struct TokenTile {
    const T* latents[kTileKeys];
    const T* ropes[kTileKeys];
    int64_t start;
    int tokens;
  };

  void attend_tile(const PrefillTile& tile, int group) {
    const int64_t last = tile.position + tile.num_queries;
    read({tile, group * group_, tile.position < a_.window ? 0 : tile.position - a_.window + 1, last});
    for (int begin = 0; begin < num_rows_; begin += kLanes) {
      const int count = turn_results(begin);
      for (int i = 0; i < count; ++i) {
        const int row = begin + i;
        finish<T>(a_, tile.token + row / group_, group * group_ + row % group_, max_[row], sum_[row],
                  lines_ + i * rank_);
      }
    }
  }

  void attend_chunk(int64_t chunk, int group) {
    const DecodeQuery& query = plan_.decodes[plan_.chunk_owner[chunk]];
    const int64_t first = query.first + (chunk - query.first_chunk) * kChunk;
    const int64_t last = first + kChunk < query.last ? first + kChunk : query.last;
    const int head = group * group_;
    read({{query.row, query.token, query.last - 1, 1}, head, first, last});
    for (int begin = 0; begin < num_rows_; begin += kLanes) {
      const int count = turn_results(begin);
      for (int i = 0; i < count; ++i) {
        const int row = begin + i;
        if (query.num_chunks == 1)
          finish<T>(a_, query.token, head + row, max_[row], sum_[row], lines_ + i * rank_);
        else
          keep_partial(a_, plan_, chunk, head + row, max_[row], sum_[row], lines_ + i * rank_);
      }
    }
    if (query.num_chunks == 1) return;
    int& left = plan_.chunks_left[plan_.chunk_owner[chunk] * a_.num_kv_heads + group];
    if (__atomic_sub_fetch(&left, 1, __ATOMIC_ACQ_REL) == 0)
      for (int h = 0; h < group_; ++h) merge_partials<T>(a_, plan_, query, head + h, lines_);
  }

  // Sums up what the queries of a unit see: acc_, max_ and sum_.
  void read(const Unit& unit) {
    begin(unit);
    // What a longer window shows lies before the first token.
    const int64_t end = unit.queries.position + unit.queries.num_queries;
    window_ = a_.window < end ? a_.window : end;
    TokenTile tiles[2];
    int now = 0;
    find(unit, unit.first, tiles[now]);
    for (; tiles[now].tokens > 0; now = 1 - now) {
      TokenTile &tile = tiles[now], &ahead = tiles[1 - now];
      find(unit, tile.start + kTileKeys, ahead);
      score(tile);
      weigh(unit, tile.start);
      add(tile, ahead);
    }
  }

  void begin(const Unit& unit) {
    num_rows_ = unit.queries.num_queries * group_;
    columns_ = (num_rows_ + kLanes - 1) / kLanes * kLanes;
    stride_ = stride_of(columns_);
    memset(acc_, 0, rank_ * stride_ * sizeof(float));
    for (int row = 0; row < columns_; ++row) max_[row] = kLowest, sum_[row] = 0, places_[row] = float(row / group_);
    for (int row = 0; row < columns_; row += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        T query[kMaxRank];
        const int which = row + i < num_rows_ ? row + i : num_rows_ - 1;
        const int64_t token = unit.queries.token + which / group_;
        const int head = unit.head + which % group_;
        load_query(a_, token, head, query);
        Pack<T>::row(query, a_.keys.head_dim, lines_ + i * words_);
        load_query(ropes_, token, head, query);
        Pack<T>::row(query, ropes_.keys.head_dim, lines_ + i * words_ + latent_words_);
      }
      for (int w = 0; w < words_; w += kLanes) turn(lines_ + w, words_, kLanes, queries_ + w * stride_ + row, stride_);
    }
  }

  void find(const Unit& unit, int64_t start, TokenTile& found) const {
    const int64_t left = unit.last - start;
    const int64_t* table = a_.block_tables + unit.queries.row * a_.table_stride;
    found.start = start, found.tokens = int(left < kTileKeys ? left : kTileKeys);
    find_tokens(a_, table, 0, start, found.tokens, found.latents, found.latents);
    find_tokens(ropes_, table, 0, start, found.tokens, found.ropes, found.ropes);
  }

  void score(const TokenTile& tile) {
    multiply_keys(tile.latents, tile.tokens, a_.keys.head_dim, latent_words_, queries_,
                  [](auto& sums, int, int) HF_PAGED_INLINE { set_zero(sums); });
    const float* scores = scores_;
    const int stride = stride_;
    multiply_keys(tile.ropes, tile.tokens, ropes_.keys.head_dim, rope_words_, queries_ + latent_words_ * stride_,
                  [scores, stride](auto& sums, int row, int column)
                      HF_PAGED_INLINE { load_block(sums, scores + row * stride + column, stride); });
  }

  // scores = start + keys . queries
  template <class Start>
  void multiply_keys(const T* const* keys, int tokens, int dim, int words, const float* queries, Start start) {
    const bool is_plain = Pack<T>::kIsPlain && dim % kPad == 0;
    const float* rows[kTileKeys];
    for (int t = 0; t < tokens; ++t) {
      rows[t] = is_plain ? (const float*)keys[t] : keys_ + t * words;
      if (!is_plain) Pack<T>::row(keys[t], dim, keys_ + t * words);
    }
    // Zeros stand for tokens past the last, never what a slot may hold.
    float* zeros = keys_ + kTileKeys * words;
    if (tokens < kTileKeys) memset(zeros, 0, words * sizeof(float));
    const int num_rows = (tokens + kBlockRows - 1) / kBlockRows * kBlockRows;
    for (int t = tokens; t < num_rows; ++t) rows[t] = zeros;
    multiply<Mul>(Rows{rows}, queries, stride_, num_rows, columns_, words, scores_, stride_, start);
  }

  template <int kVecs>
  HF_PAGED_INLINE static void load_block(Vec (&sums)[kBlockRows][kVecs], const float* from, int stride) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = load(from + i * stride + j * kLanes);
  }

  // Scores become weights 2^(score - maximum); the factors bring what was added before to the new maximum.
  void weigh(const Unit& unit, int64_t start) {
    const int64_t position = unit.queries.position, last = position + unit.queries.num_queries - 1;
    // A scale that is not positive turns the maximum around, so that scores are scaled before it is taken.
    const bool is_bent = a_.scale <= 0;
    const bool hides = start + kTileKeys - 1 > position || start <= last - window_;
    const Vec factor = splat(is_bent ? 1 : a_.scale * kLog2E);
    for (int row = 0; row < columns_; row += kLanes) {
      float* scores = scores_ + row;
      if (is_bent)
        for (int t = 0; t < kTileKeys; ++t) store(scores + t * stride_, to_log2(a_, load(scores + t * stride_)));
      if (hides) hide(position - start, load(places_ + row), scores);
      const Vec of_tile = largest_of(scores) * factor;
      const Vec before = load(max_ + row), largest = max(before, of_tile);
      const Vec factors = exp2(before - largest), shift = splat(0) - largest;
      Vec rest_scale = splat(0);
      if (Pack<T>::kRestSteps > 0) {
        const Vec most = exp2(of_tile - largest);
        rest_scale = splat(Pack<T>::kRestSteps) / most;
        store(rest_scales_ + row, most * splat(1 / Pack<T>::kRestSteps));
      }
      Vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
      for (int t = 0; t < kTileKeys; t += 4) {
        float* at = scores + t * stride_;
        Vec weights[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          weights[i] = exp2(fma(load(at + i * stride_), factor, shift));
          sums[i] = sums[i] + weights[i];
        }
        Pack<T>::weights(weights, rest_scale, at, stride_);
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

  // Hides from each query what it does not see, and what lies past the last token. `position` is that of the first
  // query, counted from the first token of the tile; `places` are those of the queries beside it.
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
  void add(const TokenTile& tile, const TokenTile& ahead) {
    const T* values[kTileKeys] = {};
    for (int t = 0; t < tile.tokens; ++t) values[t] = tile.latents[t];
    Pack<T>::values(values, a_.keys.head_dim, value_stride_, values_);
    constexpr int kColumns = kBlockVecs * kLanes;
    const int blocks = rank_ / kBlockRows * ((columns_ + kColumns - 1) / kColumns);
    const int per_block = (kTileKeys + blocks - 1) / blocks;
    const ValueProduct product = {values_, value_stride_, scores_, acc_, factors_, rest_scales_, stride_};
    int next = 0;
    const auto start = [&](auto& sums, int row, int column) HF_PAGED_INLINE {
      for (int i = 0; i < per_block && next < ahead.tokens; ++i, ++next) {
        prefetch(ahead.latents[next], a_.keys.head_dim * sizeof(T));
        prefetch(ahead.ropes[next], ropes_.keys.head_dim * sizeof(T));
      }
      Pack<T>::start(sums, product, row, column);
    };
    multiply<Mul>(Columns{values_, value_stride_}, scores_, Pack<T>::kWeightRows * stride_, rank_, columns_,
                  Pack<T>::depth((tile.tokens + 1) / 2 * 2), acc_, stride_, start);
  }

  // Brings the sums of kLanes rows into lines_, one after another. Returns how many of them are queries.
  int turn_results(int begin) {
    turn(acc_ + begin, stride_, rank_, lines_, rank_);
    return num_rows_ - begin < kLanes ? num_rows_ - begin : kLanes;
  }

  // The maximum of nothing: finite, so that it can be subtracted from scores of -infinity.
  static constexpr float kLowest = -3e38f;
  static constexpr int64_t kFar = 4096;  // More than the places and the tokens of a tile.

  const Attention &a_, &ropes_;
  Plan& plan_;
  const int group_;                         // Heads of a unit.
  int rank_, value_stride_;                 // Floats of a padded latent, from one to the next.
  int latent_words_, rope_words_, words_;   // Of a packed key.
  int num_rows_, columns_, stride_;         // Of a unit: queries times heads; rounded up; from one row to the next.
  int64_t window_;
  // In the columns of matrices stand the queries of a unit, each with the heads of its group.
  float* queries_;  // [words, stride]
  float* keys_;     // [kTileKeys, words of a part], and a row of zeros.
  float* values_;   // [depth(kTileKeys), value_stride], and what rests need.
  float* scores_;   // [kTileKeys, stride]; then the weights.
  float* acc_;      // [rank, stride]
  float* lines_;    // [kLanes, words or rank]: queries before they become columns, results after.
  float *max_, *sum_, *factors_, *rest_scales_;  // [stride]
  float* places_;                                // [stride]; a query's place in the unit.
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
