// The tiles of tokens that a worker reads while it decodes: what is read now, and what comes next.
#pragma once
#include "plan.h"
#include "tokens.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

constexpr int kMaxTile = 64;

template <class T>
struct Tile {
  const T* keys[kMaxTile];  // One a token; the last token's stands for what lies past it.
  const T* values[kMaxTile];
  int tokens;
  int64_t chunk;
  int kv_head;
  bool is_first, is_last;  // Of its unit.
};

// Walks the units of decoding, shared with the other workers, tile by tile. Being one tile ahead of the
// arithmetic, it tells what to prefetch, across blocks, heads and rows.
template <class T>
class TileWalk {
 public:
  TileWalk(const Attention& a, Plan& plan) : a_(a), plan_(plan) {
    // Keys that stay in the L1 cache while the query heads pass over them; measured best for each width.
    const int fit = (sizeof(T) == 2 ? 16384 : 8192) / int(a.keys.head_dim * sizeof(T));
    tile_tokens_ = fit >= 64 ? 64 : fit >= 32 ? 32 : 16;
  }

  bool next(Tile<T>& tile) {
    tile.is_first = at_ == end_;
    if (tile.is_first && !next_unit()) return false;
    tile.chunk = chunk_, tile.kv_head = kv_head_;
    tile.tokens = int(end_ - at_ < tile_tokens_ ? end_ - at_ : tile_tokens_);
    find_tokens(a_, table_, kv_head_, at_, tile.tokens, tile.keys, tile.values);
    for (int t = tile.tokens; t < tile_tokens_; ++t)
      tile.keys[t] = tile.keys[t - 1], tile.values[t] = tile.values[t - 1];
    at_ += tile.tokens;
    tile.is_last = at_ == end_;
    return true;
  }

 private:
  bool next_unit() {
    if (unit_ == last_unit_) {
      const int64_t total = int64_t(plan_.chunk_owner.size()) * a_.num_kv_heads;
      unit_ = __atomic_fetch_add(&plan_.next_chunk, plan_.chunks_at_once, __ATOMIC_RELAXED);
      last_unit_ = unit_ + plan_.chunks_at_once < total ? unit_ + plan_.chunks_at_once : total;
      if (unit_ >= total) {
        unit_ = last_unit_ = total;
        return false;
      }
    }
    chunk_ = unit_ / a_.num_kv_heads, kv_head_ = int(unit_ % a_.num_kv_heads), ++unit_;
    const DecodeQuery& query = plan_.decodes[plan_.chunk_owner[chunk_]];
    table_ = a_.block_tables + query.row * a_.table_stride;
    at_ = query.first + (chunk_ - query.first_chunk) * kChunk;
    end_ = at_ + kChunk < query.last ? at_ + kChunk : query.last;
    return true;
  }

  const Attention& a_;
  Plan& plan_;
  int tile_tokens_;
  int64_t unit_ = 0, last_unit_ = 0;
  int64_t chunk_ = 0, at_ = 0, end_ = 0;
  int kv_head_ = 0;
  const int64_t* table_ = nullptr;
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
