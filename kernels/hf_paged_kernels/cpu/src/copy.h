// Moving keys and values: no arithmetic, so no ISA of its own.
#pragma once
#include <cstdint>

#include "plan.h"

namespace hf_paged {

// New states of keys or of values, and the cache that takes them.
struct Write {
  const char* states;        // [num_tokens, num_kv_heads, head_dim]
  int64_t state_strides[3];  // Elements.
  char* cache;               // [num_blocks, num_kv_heads, block_size, head_dim], contiguous.
  int64_t num_kv_heads, block_size, head_dim, element_size;
};

// A token whose slot is negative is not written: a step may be padded to a fixed shape.
void write_tokens(const Write* writes, int count, const int64_t* slots, int64_t num_tokens, Parallel parallel);

struct Copy {
  char* cache;  // [num_blocks, block_bytes]
  int64_t block_bytes;
};

void copy_blocks(const Copy* caches, int count, const int64_t* source, const int64_t* destination, int64_t num_copies,
                 Parallel parallel);

}  // namespace hf_paged
