// The plan of one call: how it is cut into units of work. The cut depends on the rows alone, never on the threads, and each
// row's cut depends on that row alone: results are the same for any number of threads and in any batch.
#pragma once
#include <memory>
#include <vector>

#include "attention.h"

namespace hf_paged {

// Tokens of one unit of decoding: long enough that merging costs little, short enough to share out.
constexpr int kChunk = 512;

// One query token read by itself over the tokens first .. last - 1 of its row.
struct DecodeQuery {
  int64_t row, token, first, last;
  int64_t first_chunk, num_chunks;
};

// Query tokens of one row that are attended together.
struct PrefillTile {
  int64_t row, token, position;  // Of the first query: its index in `query`, its place in the row.
  int num_queries;
};

struct Plan {
  std::vector<DecodeQuery> decodes;
  std::vector<int> chunk_owner;  // For each chunk, the index of its DecodeQuery.
  std::vector<PrefillTile> tiles;
  std::vector<int64_t> blind;          // Query tokens before the first token of their row: they see nothing.
  std::unique_ptr<float[]> partials;   // [chunks, num_heads, partial_floats]; null if no row is split.
  std::unique_ptr<int[]> chunks_left;  // [decodes, num_kv_heads]

  // Units that the workers took so far, counted as (chunk or tile, KV head).
  int64_t next_chunk = 0, next_tile = 0;
  int heads_at_once = 1;  // KV heads of a chunk that a worker takes at a time.

  int64_t num_units(const Attention& a) const { return int64_t(chunk_owner.size() + tiles.size()) * a.num_kv_heads; }
};

Plan make_plan(const Attention& a);

// Floats that a chunk leaves for each head: maximum, sum, weighted values.
inline int64_t partial_floats(const Attention& a) { return 2 + padded(a.values.head_dim); }

// A prefill tile: query tokens times query heads per KV head, in rows of three vectors, kTileKeys keys at a time.
// Large heads have smaller tiles: there are fewer heads, and as many tiles to share out.
constexpr int kTileKeys = 64;
inline int queries_per_tile(const Attention& a) {
  const int rows = a.keys.head_dim + a.values.head_dim > 256 ? 144 : 192;
  return rows >= a.group() ? rows / a.group() : 1;
}
// Floats from one row of a matrix to the next if it has `columns`: an odd number of lines, so that those below each
// other do not compete for the same sets of the cache.
inline int stride_of(int columns) { return ((columns + 15) / 16 | 1) * 16; }

// Floats from one head's sums of weighted values to the next. Those of int8 codes are added in lines of 64.
inline int acc_stride(const Attention& a) {
  return a.codes == Codes::kInt8 ? (a.values.head_dim + 63) / 64 * 64 : padded(a.values.head_dim);
}

// Floats of what decoding keeps of one KV head between its tiles: queries, weighted values, maximums, sums.
inline int64_t state_floats(const Attention& a) {
  return a.group() * (padded(a.keys.head_dim) + acc_stride(a)) + 2 * padded(a.group());
}

// Floats of scratch memory that a worker needs.
int64_t scratch_floats(const Attention& a);

// Scratch memory of the running thread, kept for its next call.
float* scratch_of_thread(int64_t floats);

// Sets the results of queries that see nothing to zero.
void clear_blind(const Attention& a, const Plan& plan);

// The code that is compiled once for each ISA: works on units until none is left.
using Work = void (*)(const Attention&, Plan&, float* scratch);

// Runs body(context, 0 .. count - 1), on several threads if they are there.
using Parallel = void (*)(int64_t count, void (*body)(void* context, int64_t index), void* context);

// `work` is the entry for the call's dtype.
void attend(const Attention& a, Work work, int num_threads, Parallel parallel);

}  // namespace hf_paged
