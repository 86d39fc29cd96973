// Compiled once for each ISA, as work.cpp is: what pages of codes need.
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

template <class P>
void prefill_codes(const Attention& a, Plan& plan, float* scratch) {
#ifdef __AVX512VNNI__
  // Three bytes a number, which float32 wants, would cost more than floats.
  if constexpr (std::is_same_v<P, int8_t>)
    if (a.dtype != Dtype::kFloat32) return Prefiller<P, BytePack>(a, plan, scratch).run();
#endif
  Prefiller<P>(a, plan, scratch).run();
}

template <class P>
void code_work(const Attention& a, Plan& plan, float* scratch) {
  prefill_codes<P>(a, plan, scratch);
  Decoder<P>(a, plan, scratch).run();
}

}  // namespace HF_PAGED_ISA

extern const CodeEntries HF_PAGED_JOIN(codes_, HF_PAGED_ISA)[2] = {
    {HF_PAGED_ISA::code_work<int8_t>, HF_PAGED_ISA::store_codes<int8_t>},
    {HF_PAGED_ISA::code_work<float8>, HF_PAGED_ISA::store_codes<float8>}};

}  // namespace hf_paged
