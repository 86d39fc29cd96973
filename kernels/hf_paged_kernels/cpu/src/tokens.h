// Where the tokens of a row lie in its pages.
#pragma once
#include "attention.h"

namespace hf_paged {
namespace HF_PAGED_ISA {

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

}  // namespace HF_PAGED_ISA
}  // namespace hf_paged
