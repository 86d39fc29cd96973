// One call of `latent_attention`: a latent is the key and the value of all heads, and a rope part the rest of the key.
#pragma once
#include "plan.h"

namespace hf_paged {

// The heads are shared out evenly among `num_kv_heads` groups, which read the same pages: `head_stride` is 0.
struct LatentAttention {
  Attention latents;  // Its values are its keys.
  Attention ropes;    // The same rows and heads; it has keys alone.
};

constexpr int kMaxRank = 1024;  // Numbers of a latent or a rope part.

// Into how many groups the heads are shared out, so that a group fits the rows of a tile.
int latent_groups(int num_heads);

// Floats of scratch memory that a worker needs.
int64_t scratch_floats(const LatentAttention& a);

// The code that is compiled once for each ISA: works on units until none is left.
using LatentWork = void (*)(const LatentAttention&, Plan&, float* scratch);

// The entries of the ISA in use, by Dtype.
const LatentWork* latent_work_in_use();

// `work` is the entry for the call's dtype.
void attend(const LatentAttention& a, LatentWork work, int num_threads, Parallel parallel);

}  // namespace hf_paged
