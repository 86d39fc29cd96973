#include "plan.h"

#include <algorithm>
#include <cstring>

namespace hf_paged {

Plan make_plan(const Attention& a) {
  Plan plan;
  bool is_split = false;
  const int per_tile = queries_per_tile(a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t begin = a.cu_seqlens_q[row], end = a.cu_seqlens_q[row + 1], length = a.context_lens[row];
    const int64_t before = length - (end - begin);  // Position of the first query.
    int64_t token = begin;
    for (; token < end && before + (token - begin) < 0; ++token) plan.blind.push_back(token);
    if (end - token == 1) {
      const int64_t first = std::max<int64_t>(0, length - a.window);
      const int64_t chunks = (length - first + kChunk - 1) / kChunk;
      plan.decodes.push_back({row, token, first, length, int64_t(plan.chunk_owner.size()), chunks});
      plan.chunk_owner.insert(plan.chunk_owner.end(), chunks, int(plan.decodes.size()) - 1);
      is_split |= chunks > 1;
      continue;
    }
    // The last tiles of a row see the most: they come first, so that no worker starts one at the end.
    for (int64_t i = (end - token + per_tile - 1) / per_tile - 1; i >= 0; --i) {
      const int64_t at = token + i * per_tile;
      plan.tiles.push_back({row, at, before + (at - begin), int(std::min<int64_t>(per_tile, end - at))});
    }
  }
  if (is_split) {
    plan.partials.reset(new float[plan.chunk_owner.size() * a.num_heads * partial_floats(a)]);
    plan.chunks_left.reset(new int[plan.decodes.size() * a.num_kv_heads]);
    for (size_t i = 0; i < plan.decodes.size() * a.num_kv_heads; ++i)
      plan.chunks_left[i] = int(plan.decodes[i / a.num_kv_heads].num_chunks);
  }
  return plan;
}

int64_t scratch_floats(const Attention& a) {
  const int64_t key = padded(a.keys.head_dim), value = padded(a.values.head_dim), group = a.group(),
                rows = stride_of(queries_per_tile(a) * a.group());
  const int64_t decode = a.num_kv_heads * state_floats(a) + group * kTileKeys + 2 * padded(group);
  const int64_t prefill = rows * (key + value + kTileKeys + 5) + kTileKeys * (key + stride_of(int(value))) + key;
  return std::max(decode, prefill);
}

namespace {

struct Shared {
  const Attention& a;
  Plan& plan;
  Work work;
};

}  // namespace

float* scratch_of_thread(int64_t floats) {
  thread_local std::unique_ptr<float[]> scratch;
  thread_local int64_t held = 0;
  if (held < floats) {
    scratch.reset(new float[floats + 16]);
    held = floats;
  }
  // Aligned to lines, so that no vector straddles two.
  return (float*)((uintptr_t(scratch.get()) + 63) / 64 * 64);
}

void clear_blind(const Attention& a, const Plan& plan) {
  const int64_t token_bytes = int64_t(a.num_heads) * a.values.head_dim * (a.dtype == Dtype::kFloat32 ? 4 : 2);
  for (int64_t token : plan.blind) memset((char*)a.out + token * token_bytes, 0, token_bytes);
}

void attend(const Attention& a, Work work, int num_threads, Parallel parallel) {
  Plan plan = make_plan(a);
  clear_blind(a, plan);
  const int64_t units = plan.num_units(a);
  if (units == 0) return;
  // With units to spare a worker takes all the heads of a chunk, which lie side by side in each block.
  if (int64_t(plan.chunk_owner.size()) >= 4 * num_threads) plan.heads_at_once = a.num_kv_heads;
  Shared shared{a, plan, work};
  const auto body = [](void* context, int64_t) {
    const Shared& s = *static_cast<Shared*>(context);
    s.work(s.a, s.plan, scratch_of_thread(scratch_floats(s.a)));
  };
  parallel(std::min<int64_t>(num_threads, units), body, &shared);
}

}  // namespace hf_paged
