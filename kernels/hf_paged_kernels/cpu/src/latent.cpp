#include "latent.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace hf_paged {

extern const LatentWork latent_work_baseline[3];
#ifdef HF_PAGED_X86
extern const LatentWork latent_work_avx2[3], latent_work_avx512[3], latent_work_avx512_bf16[3];
#endif

namespace {

constexpr int kMostHeads = 96;
constexpr int kMostLanes = 16;  // Of a vector of the widest ISA.

struct Shared {
  const LatentAttention& a;
  Plan& plan;
  LatentWork work;
};

}  // namespace

const LatentWork* latent_work_in_use() {
#ifdef HF_PAGED_X86
  const char* isa = hf_paged_isa();
  if (strcmp(isa, "avx512_bf16") == 0) return latent_work_avx512_bf16;
  if (strcmp(isa, "avx512") == 0) return latent_work_avx512;
  if (strcmp(isa, "avx2") == 0) return latent_work_avx2;
#endif
  return latent_work_baseline;
}

int latent_groups(int num_heads) {
  int groups = (num_heads + kMostHeads - 1) / kMostHeads;
  while (num_heads % groups != 0) ++groups;
  return groups;
}

int64_t scratch_floats(const LatentAttention& a) {
  const int64_t rank = padded(a.latents.keys.head_dim), rope = padded(a.ropes.keys.head_dim);
  const int64_t rows = stride_of(queries_per_tile(a.latents) * a.latents.group());
  return rows * (2 * rank + rope + kTileKeys + 5) + (kTileKeys + 1) * std::max(rank, rope) +
         kTileKeys * stride_of(int(rank)) + kMostLanes * (rank + rope);
}

void attend(const LatentAttention& a, LatentWork work, int num_threads, Parallel parallel) {
  Plan plan = make_plan(a.latents);
  clear_blind(a.latents, plan);
  const int64_t units = plan.num_units(a.latents);
  if (units == 0) return;
  Shared shared{a, plan, work};
  const auto body = [](void* context, int64_t) {
    const Shared& s = *static_cast<Shared*>(context);
    s.work(s.a, s.plan, scratch_of_thread(scratch_floats(s.a)));
  };
  parallel(std::min<int64_t>(num_threads, units), body, &shared);
}

}  // namespace hf_paged
