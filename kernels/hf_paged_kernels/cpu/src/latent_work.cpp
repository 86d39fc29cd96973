// Compiled once for each ISA, as work.cpp is.
#include <cmath>
#include <cstring>

#include "attention.h"
#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#else
#include "vector_plain.h"
#endif
#include "dot.h"
#include "latent_tiles.h"

#define HF_PAGED_JOIN2(a, b) a##b
#define HF_PAGED_JOIN(a, b) HF_PAGED_JOIN2(a, b)

namespace hf_paged {
namespace HF_PAGED_ISA {

template <class T>
void latent_work(const LatentAttention& a, Plan& plan, float* scratch) {
  LatentAttender<T>(a, plan, scratch).run();
}

}  // namespace HF_PAGED_ISA

extern const LatentWork HF_PAGED_JOIN(latent_work_, HF_PAGED_ISA)[3] = {
    HF_PAGED_ISA::latent_work<float>, HF_PAGED_ISA::latent_work<bfloat16>, HF_PAGED_ISA::latent_work<float16>};

}  // namespace hf_paged
