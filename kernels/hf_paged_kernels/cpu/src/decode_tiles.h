// The tiles of tokens that a worker reads while it decodes: what is read now, and what comes next.
#pragma once
#include "plan.h"
#include "tokens.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

constexpr int kMaxTile = 64;

template <class T>
struct Tile {
  const T* keys[kMaxTile];  // One per token; the last token's stands for what lies past it.
  const T* values[kMaxTile];
  int tokens;
  int64_t chunk;
  int kv_head;
  bool is_first, is_last;  // Of its unit.
  const int64_t* table;    // Of its row.
  int64_t start;
};

// Walks the units of decoding, shared with the other workers, tile by tile. Being one tile ahead of the
// arithmetic, it tells what to prefetch, across blocks, heads and rows.
template <class T>
class TileWalk {
 public:
  TileWalk(const Attention& a, Plan& plan) : a_(a), plan_(plan) {
    // Keys that stay in the L1 cache while the query heads pass over them; measured best for each width.
    const int fit = (sizeof(T) == 4 ? 8192 : 16384) / int(a.keys.head_dim * sizeof(T));
    tile_tokens_ = fit >= 64 ? 64 : fit >= 32 ? 32 : 16;
    // Heads take turns block by block, so that a block is read in the order of memory, in which they lie side by
    // side. Narrow ones lose more by the turns than they gain.
    const int64_t least = a.keys.head_dim * sizeof(T) < 256 ? kChunk : a.block_size;
    stretch_tokens_ = (least + tile_tokens_ - 1) / tile_tokens_ * tile_tokens_;
  }

  bool next(Tile<T>& tile) {
    if (at_ == end_ && !next_unit()) return false;
    tile.chunk = chunk_, tile.kv_head = kv_head_;
    tile.tokens = int(end_ - at_ < tile_tokens_ ? end_ - at_ : tile_tokens_);
    tile.table = table_, tile.start = at_;
    find_tokens(a_, table_, kv_head_, at_, tile.tokens, tile.keys, tile.values);
    if constexpr (kIsCode<T>) prefetch_scales(a_, table_, kv_head_, at_, tile.tokens);
    tile.is_first = at_ == begin_, tile.is_last = at_ + tile.tokens == end_;
    for (int t = tile.tokens; t < tile_tokens_; ++t)
      tile.keys[t] = tile.keys[t - 1], tile.values[t] = tile.values[t - 1];
    at_ += tile.tokens;
    if (at_ < stretch_end_) return true;
    if (++kv_head_ < last_head_)
      at_ = stretch_;
    else
      kv_head_ = first_head_, begin_stretch();
    return true;
  }

 private:
  void begin_stretch() { stretch_ = at_, stretch_end_ = end_ - at_ < stretch_tokens_ ? end_ : at_ + stretch_tokens_; }

  bool next_unit() {
    const int64_t units = int64_t(plan_.chunk_owner.size()) * a_.num_kv_heads;
    const int64_t unit = __atomic_fetch_add(&plan_.next_chunk, plan_.heads_at_once, __ATOMIC_RELAXED);
    if (unit >= units) return false;
    chunk_ = unit / a_.num_kv_heads;
    kv_head_ = first_head_ = int(unit % a_.num_kv_heads), last_head_ = first_head_ + plan_.heads_at_once;
    const DecodeQuery& query = plan_.decodes[plan_.chunk_owner[chunk_]];
    table_ = a_.block_tables + query.row * a_.table_stride;
    at_ = begin_ = query.first + (chunk_ - query.first_chunk) * kChunk;
    end_ = at_ + kChunk < query.last ? at_ + kChunk : query.last;
    begin_stretch();
    return true;
  }

  const Attention& a_;
  Plan& plan_;
  int tile_tokens_;
  int64_t stretch_tokens_;  // Tokens that a head reads before the next one's turn, in whole tiles.
  int64_t chunk_ = 0, at_ = 0, begin_ = 0, end_ = 0, stretch_ = 0, stretch_end_ = 0;
  int kv_head_ = 0, first_head_ = 0, last_head_ = 0;
  const int64_t* table_ = nullptr;
};

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
