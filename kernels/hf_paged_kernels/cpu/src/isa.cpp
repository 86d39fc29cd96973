#include "isa.h"

#include <cstring>
#include <string>

#define HF_PAGED_EXPORT __attribute__((visibility("default")))

namespace hf_paged {

extern const Work work_baseline[3];
extern const CodeEntries codes_baseline[2];
#ifdef HF_PAGED_X86
extern const Work work_avx2[3], work_avx512[3], work_avx512_bf16[3];
extern const CodeEntries codes_avx2[2], codes_avx512[2], codes_avx512_bf16[2];
#endif

namespace {

struct Isa {
  const char* name;
  const Work* work;
  const CodeEntries* codes;
  bool is_there;
};

const Isa* all(int& count) {
#ifdef HF_PAGED_X86
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const Isa isas[] = {
      {"baseline", work_baseline, codes_baseline, true},
      {"avx2", work_avx2, codes_avx2, avx2},
      {"avx512", work_avx512, codes_avx512, avx512},
      {"avx512_bf16", work_avx512_bf16, codes_avx512_bf16, avx512_bf16},
  };
#else
  static const Isa isas[] = {{"baseline", work_baseline, codes_baseline, true}};
#endif
  count = sizeof isas / sizeof isas[0];
  return isas;
}

const Isa* widest() {
  int count;
  const Isa* isas = all(count);
  while (!isas[count - 1].is_there) --count;
  return &isas[count - 1];
}

const Isa* in_use = nullptr;  // Set when first asked for; two threads would set the same.

const Isa* current() {
  const Isa* isa = __atomic_load_n(&in_use, __ATOMIC_ACQUIRE);
  if (isa == nullptr) __atomic_store_n(&in_use, isa = widest(), __ATOMIC_RELEASE);
  return isa;
}

}  // namespace

const Work* work_in_use() { return current()->work; }
const CodeEntries* codes_in_use() { return current()->codes; }

}  // namespace hf_paged

extern "C" {

HF_PAGED_EXPORT const char* hf_paged_isas() {
  static const std::string names = [] {
    int count;
    const hf_paged::Isa* isas = hf_paged::all(count);
    std::string text;
    for (int i = 0; i < count; ++i)
      if (isas[i].is_there) text += (text.empty() ? "" : " ") + std::string(isas[i].name);
    return text;
  }();
  return names.c_str();
}

HF_PAGED_EXPORT const char* hf_paged_isa() { return hf_paged::current()->name; }

HF_PAGED_EXPORT bool hf_paged_use_isa(const char* name) {
  int count;
  const hf_paged::Isa* isas = hf_paged::all(count);
  for (int i = 0; i < count; ++i)
    if (isas[i].is_there && strcmp(isas[i].name, name) == 0) {
      __atomic_store_n(&hf_paged::in_use, &isas[i], __ATOMIC_RELEASE);
      return true;
    }
  return false;
}

}  // extern "C"
