#include "copy.h"

#include <cstring>

namespace hf_paged {
namespace {

// Below this many bytes waking the other threads costs more than they save.
constexpr int64_t kWorthSharing = 1 << 18;

template <class Body>
void share(int64_t count, int64_t bytes, Parallel parallel, const Body& body) {
  if (bytes < kWorthSharing) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel(count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, (void*)&body);
}

}  // namespace

void copy_token(const Write& w, int64_t token, int64_t slot) {
  const int64_t vector_bytes = w.head_dim * w.element_size;
  char* to = w.cache + (slot / w.block_size * w.num_kv_heads * w.block_size + slot % w.block_size) * vector_bytes;
  const char* from = w.states + token * w.state_strides[0] * w.element_size;
  for (int64_t head = 0; head < w.num_kv_heads; ++head) {
    if (w.state_strides[2] == 1)
      memcpy(to, from, vector_bytes);
    else
      for (int64_t d = 0; d < w.head_dim; ++d)
        memcpy(to + d * w.element_size, from + d * w.state_strides[2] * w.element_size, w.element_size);
    from += w.state_strides[1] * w.element_size;
    to += w.block_size * vector_bytes;
  }
}

void write_tokens(const Write* writes, int count, const int64_t* slots, int64_t num_tokens, Parallel parallel) {
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i)
    bytes += num_tokens * writes[i].num_kv_heads * writes[i].head_dim * writes[i].element_size;
  share(num_tokens, bytes, parallel, [&](int64_t token) {
    if (slots[token] < 0) return;
    for (int i = 0; i < count; ++i) writes[i].store(writes[i], token, slots[token]);
  });
}

void copy_blocks(const Copy* caches, int count, const int64_t* source, const int64_t* destination, int64_t num_copies,
                 Parallel parallel) {
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += num_copies * caches[i].block_bytes;
  share(num_copies, bytes, parallel, [&](int64_t n) {
    for (int i = 0; i < count; ++i) {
      const int64_t size = caches[i].block_bytes;
      memcpy(caches[i].cache + destination[n] * size, caches[i].cache + source[n] * size, size);
    }
  });
}

}  // namespace hf_paged
