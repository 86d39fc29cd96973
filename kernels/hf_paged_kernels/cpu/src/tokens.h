// Where the tokens of a row lie in its pages.
#pragma once
#include "attention.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

// Always inlined: GCC takes a call that only prefetches for one without effect.
HF_PAGED_INLINE inline void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// Keys and values of the tokens start .. start + tokens - 1 of the row that `table` belongs to.
template <class T>
inline void find_tokens(const Attention& a, const int64_t* table, int kv_head, int64_t start, int tokens,
                        const T** keys, const T** values) {
  int64_t index = start / a.block_size, offset = start % a.block_size;
  for (int t = 0; t < tokens; ++index, offset = 0) {
    const T* key = (const T*)a.keys.data + table[index] * a.keys.block_stride + kv_head * a.keys.head_stride;
    const T* value = (const T*)a.values.data + table[index] * a.values.block_stride + kv_head * a.values.head_stride;
    for (; offset < a.block_size && t < tokens; ++offset, ++t)
      keys[t] = key + offset * a.keys.head_dim, values[t] = value + offset * a.values.head_dim;
  }
}

// Scales of the same tokens, times `unit`; zeros past them, up to `most`.
inline void read_scales(const Attention& a, const int64_t* table, int kv_head, int64_t start, int tokens, int most,
                        float unit, float* of_keys, float* of_values) {
  int64_t index = start / a.block_size, offset = start % a.block_size;
  for (int t = 0; t < tokens; ++index, offset = 0) {
    const int64_t first = (table[index] * a.num_kv_heads + kv_head) * a.block_size;
    const float *keys = a.keys.scales + first, *values = a.values.scales + first;
    for (; offset + kLanes <= a.block_size && t + kLanes <= tokens; offset += kLanes, t += kLanes) {
      store(of_keys + t, load(keys + offset) * splat(unit));
      store(of_values + t, load(values + offset) * splat(unit));
    }
    for (; offset < a.block_size && t < tokens; ++offset, ++t)
      of_keys[t] = keys[offset] * unit, of_values[t] = values[offset] * unit;
  }
  for (int t = tokens; t < most; ++t) of_keys[t] = of_values[t] = 0;
}

HF_PAGED_INLINE inline void prefetch_scales(const Attention& a, const int64_t* table, int kv_head, int64_t start,
                                            int tokens) {
  int64_t index = start / a.block_size, offset = start % a.block_size;
  for (int64_t left = tokens; left > 0; ++index, offset = 0) {
    const int64_t count = left < a.block_size - offset ? left : a.block_size - offset;
    const int64_t first = (table[index] * a.num_kv_heads + kv_head) * a.block_size + offset;
    prefetch(a.keys.scales + first, int(count * sizeof(float)));
    prefetch(a.values.scales + first, int(count * sizeof(float)));
    left -= count;
  }
}

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
