// Moving keys and values.
#pragma once
#include <cstdint>

#include "plan.h"

namespace hf_paged {

struct Write;

// Stores one token in a slot that is not negative.
using StoreToken = void (*)(const Write&, int64_t token, int64_t slot);

// Stores numbers as they are: no arithmetic, so no ISA of its own.
void copy_token(const Write& w, int64_t token, int64_t slot);

// New states of keys or of values, and the cache that takes them.
struct Write {
  const char* states;        // [num_tokens, num_kv_heads, head_dim]
  int64_t state_strides[3];  // Elements.
  char* cache;               // [num_blocks, num_kv_heads, block_size, head_dim], contiguous.
  int64_t num_kv_heads, block_size, head_dim, element_size;
  StoreToken store = copy_token;
  // What codes need besides.
  Dtype dtype = Dtype::kFloat32;  // Of the states.
  float* scales = nullptr;        // [num_blocks, num_kv_heads, block_size]
  bool is_rotated = false;
};

// A token whose slot is negative is not written: a step may be padded to a fixed shape.
void write_tokens(const Write* writes, int count, const int64_t* slots, int64_t num_tokens, Parallel parallel);

// What is compiled for each ISA and each kind of codes.
struct CodeEntries {
  Work work;  // For any dtype of queries.
  StoreToken store;
};

struct Copy {
  char* cache;  // [num_blocks, block_bytes]
  int64_t block_bytes;
};

void copy_blocks(const Copy* caches, int count, const int64_t* source, const int64_t* destination, int64_t num_copies,
                 Parallel parallel);

}  // namespace hf_paged
