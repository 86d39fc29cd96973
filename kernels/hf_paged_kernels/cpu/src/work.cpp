// Compiled once for each ISA, with HF_PAGED_ISA as its name and the compiler's flags to match.
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
#include "decode.h"
#include "prefill.h"

#define HF_PAGED_JOIN2(a, b) a##b
#define HF_PAGED_JOIN(a, b) HF_PAGED_JOIN2(a, b)

namespace hf_paged {
namespace HF_PAGED_ISA {

template <class T>
void work(const Attention& a, Plan& plan, float* scratch) {
  Prefiller<T>(a, plan, scratch).run();
  Decoder<T>(a, plan, scratch).run();
}

}  // namespace HF_PAGED_ISA

extern const Work HF_PAGED_JOIN(work_, HF_PAGED_ISA)[3] = {HF_PAGED_ISA::work<float>, HF_PAGED_ISA::work<bfloat16>,
                                                           HF_PAGED_ISA::work<float16>};

}  // namespace hf_paged
