// One call of `paged_attention`, in plain C++: the kernels know nothing of torch.
#pragma once
#include <cstdint>

#define HF_PAGED_INLINE __attribute__((always_inline))

namespace hf_paged {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
// e4m3fn: four bits of exponent, three of mantissa, no infinity. As a code it is never NaN.
struct float8 {
  uint8_t bits;
};

// What pages hold: numbers of the query's dtype, or codes with a scale for each token and head. Keys that are codes
// were rotated (rotate.h), and so are their queries.
enum class Codes { kInt8, kFloat8, kNone };

template <class P>
constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<int8_t> = true;
template <>
inline constexpr bool kIsCode<float8> = true;

// One of the two caches, [num_blocks, num_kv_heads, block_size, head_dim]; a block's tokens lie side by side.
struct Pages {
  const void* data;
  int64_t block_stride, head_stride;  // Elements.
  int head_dim;
  const float* scales = nullptr;  // Of codes, [num_blocks, num_kv_heads, block_size].
};

struct Attention {
  Dtype dtype;
  const void* query;  // [num_tokens, num_heads, key_dim]
  int64_t query_strides[3];
  void* out;  // [num_tokens, num_heads, value_dim], contiguous.
  Pages keys, values;
  const int64_t* block_tables;  // [num_rows, max_blocks]
  int64_t table_stride;
  const int64_t* context_lens;  // [num_rows]
  const int64_t* cu_seqlens_q;  // [num_rows + 1]
  int64_t num_rows;
  int num_heads, num_kv_heads, block_size;
  float scale;
  int64_t window;      // INT64_MAX: none.
  float softcap;       // 0: none.
  const float* sinks;  // [num_heads] or null.
  Codes codes = Codes::kNone;

  int group() const { return num_heads / num_kv_heads; }
};

// Numbers of a key or a value that the kernels serve.
constexpr int kMaxHeadDim = 256;

// Head sizes are padded to this many elements in scratch memory: two vectors of the widest ISA.
constexpr int kPad = 32;
inline int padded(int dim) { return (dim + kPad - 1) / kPad * kPad; }

}  // namespace hf_paged
