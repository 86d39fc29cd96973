// Runs the kernels of every instruction set over edge cases in memory of exactly the right size, without torch.
// Built with -fsanitize=address by test_sanitize.py. Exits with 1 if an output is NaN.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "copy.h"
#include "isa.h"
#include "latent.h"

using namespace hf_paged;

namespace {

struct Row {
  int64_t context, queries;
};

struct Case {
  int num_heads, num_kv_heads, key_dim, value_dim, block_size;
  std::vector<Row> rows;
  int64_t window;
  bool softcap, sinks;
};

void in_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, context, i);
  for (auto& thread : threads) thread.join();
}

// One element of each dtype: a small number, or NaN.
void put(char* to, Dtype dtype, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t half = dtype == Dtype::kBFloat16 ? bits >> 16
                        : std::isnan(value)       ? 0x7e00
                        : value < 0               ? 0xb800
                                                  : 0x3800;
  dtype == Dtype::kFloat32 ? memcpy(to, &value, 4) : memcpy(to, &half, 2);
}

bool is_nan(const char* from, Dtype dtype) {
  uint32_t bits = 0;
  memcpy(&bits, from, dtype == Dtype::kFloat32 ? 4 : 2);
  if (dtype == Dtype::kFloat16) return (bits & 0x7fff) > 0x7c00;
  if (dtype == Dtype::kBFloat16) bits <<= 16;
  return (bits & 0x7fffffff) > 0x7f800000;
}

bool has_nan(const std::vector<char>& numbers, Dtype dtype) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  for (size_t at = 0; at < numbers.size(); at += size)
    if (is_nan(&numbers[at], dtype)) return true;
  return false;
}

// The same pages read as latents, the keys, and their rope parts, the values.
bool run_latents(const Attention& rows, int64_t tokens) {
  const int64_t size = rows.dtype == Dtype::kFloat32 ? 4 : 2;
  const Pages* pages[2] = {&rows.keys, &rows.values};
  std::vector<char> queries[2], out(tokens * rows.num_heads * rows.keys.head_dim * size);
  Attention parts[2] = {rows, rows};
  for (int i = 0; i < 2; ++i) {
    const int64_t dim = pages[i]->head_dim;
    queries[i].resize(tokens * rows.num_heads * dim * size);
    for (size_t at = 0; at < queries[i].size(); at += size) put(&queries[i][at], rows.dtype, at / size % 5 ? 0.5f : -0.5f);
    parts[i].query = queries[i].data(), parts[i].out = out.data();
    parts[i].query_strides[0] = rows.num_heads * dim, parts[i].query_strides[1] = dim;
    parts[i].keys = parts[i].values = {pages[i]->data, pages[i]->block_stride, 0, pages[i]->head_dim};
    parts[i].num_kv_heads = latent_groups(rows.num_heads), parts[i].softcap = 0, parts[i].sinks = nullptr;
  }
  attend(LatentAttention{parts[0], parts[1]}, latent_work_in_use()[int(rows.dtype)], 2, in_threads);
  return !has_nan(out, rows.dtype);
}

bool run(const Case& c, Dtype dtype, Codes codes) {
  if (codes != Codes::kNone && c.key_dim > 256) return true;  // A case for latents: larger heads go to torch.
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2, page_size = codes == Codes::kNone ? size : 1;
  int64_t width = 0, blocks = 0;
  std::vector<int64_t> lens, starts{0};
  for (const Row& row : c.rows) {
    const int64_t needed = (row.context + c.block_size - 1) / c.block_size;
    width = needed > width ? needed : width, blocks += needed;
    lens.push_back(row.context), starts.push_back(starts.back() + row.queries);
  }
  const int64_t token_words[2] = {c.key_dim, c.value_dim};
  std::vector<char> caches[2], states[2];
  std::vector<float> scales[2];  // Of codes: NaN, as numbers are, where no token is.
  for (int i = 0; i < 2; ++i) {
    caches[i].resize(blocks * c.num_kv_heads * c.block_size * token_words[i] * page_size, 0x7f);
    if (codes == Codes::kNone)
      for (size_t at = 0; at < caches[i].size(); at += size) put(&caches[i][at], dtype, NAN);
    else
      scales[i].resize(blocks * c.num_kv_heads * c.block_size, NAN);
    states[i].resize(c.num_kv_heads * token_words[i] * size);
    for (size_t at = 0; at < states[i].size(); at += size) put(&states[i][at], dtype, at / size % 3 ? 0.5f : -0.5f);
  }
  std::vector<int64_t> tables(c.rows.size() * width, 0);
  int64_t next = blocks;
  for (size_t row = 0; row < c.rows.size(); ++row)
    for (int64_t token = 0; token < lens[row]; ++token) {
      int64_t& block = tables[row * width + token / c.block_size];
      if (token % c.block_size == 0) block = --next;
      const int64_t slot = block * c.block_size + token % c.block_size;
      std::vector<Write> writes;
      for (int i = 0; i < 2; ++i) {
        writes.push_back({states[i].data(),
                          {0, token_words[i], 1},
                          caches[i].data(),
                          c.num_kv_heads,
                          c.block_size,
                          token_words[i],
                          page_size});
        if (codes == Codes::kNone) continue;
        writes[i].store = codes_in_use()[int(codes)].store;
        writes[i].dtype = dtype, writes[i].scales = scales[i].data(), writes[i].is_rotated = i == 0;
      }
      const int64_t padding = -1;
      write_tokens(writes.data(), 2, &padding, 1, in_threads);
      write_tokens(writes.data(), 2, &slot, 1, in_threads);
    }
  const int64_t tokens = starts.back();
  std::vector<char> query(tokens * c.num_heads * c.key_dim * size), out(tokens * c.num_heads * c.value_dim * size);
  for (size_t at = 0; at < query.size(); at += size) put(&query[at], dtype, at / size % 5 ? 0.5f : -0.5f);
  const std::vector<float> sinks(c.num_heads, 0.25f);
  const int64_t key_head = int64_t(c.block_size) * c.key_dim, value_head = int64_t(c.block_size) * c.value_dim;
  const Attention attention{dtype,
                            query.data(),
                            {c.num_heads * c.key_dim, c.key_dim, 1},
                            out.data(),
                            {caches[0].data(), c.num_kv_heads * key_head, key_head, c.key_dim, scales[0].data()},
                            {caches[1].data(), c.num_kv_heads * value_head, value_head, c.value_dim, scales[1].data()},
                            tables.data(),
                            width,
                            lens.data(),
                            starts.data(),
                            int64_t(c.rows.size()),
                            c.num_heads,
                            c.num_kv_heads,
                            c.block_size,
                            0.3f,
                            c.window,
                            c.softcap ? 2.0f : 0.0f,
                            c.sinks ? sinks.data() : nullptr,
                            codes};
  if (c.num_kv_heads == 1 && codes == Codes::kNone && !run_latents(attention, tokens)) return false;
  if (c.key_dim > 256) return true;
  attend(attention, codes == Codes::kNone ? work_in_use()[int(dtype)] : codes_in_use()[int(codes)].work, 2, in_threads);
  return !has_nan(out, dtype);
}

}  // namespace

int main() {
  const std::vector<Row> decode{{1, 1}, {15, 1}, {16, 1}, {17, 1}, {0, 1}, {0, 0}, {1100, 1}, {600, 1}};
  const std::vector<Row> mixed{{5, 5}, {40, 7}, {300, 1}, {2, 4}, {70, 70}};
  std::vector<Case> cases;
  for (const auto& rows : {decode, mixed, std::vector<Row>{}})
    for (int block_size : {4, 16})
      for (const auto& dims : {std::pair<int, int>{64, 64}, {20, 40}, {1, 3}, {80, 96}, {256, 256}})
        for (int64_t window : {INT64_MAX, int64_t(7)})
          cases.push_back({6, 2, dims.first, dims.second, block_size, rows, window, window == 7, dims.first == 20});
  cases.push_back({200, 1, 32, 32, 16, mixed, INT64_MAX, false, true});
  for (const auto& rows : {decode, mixed})
    for (const auto& dims : {std::pair<int, int>{512, 64}, {20, 40}, {1, 3}})
      cases.push_back({7, 1, dims.first, dims.second, 16, rows, dims.first == 20 ? 7 : INT64_MAX, false, false});
  cases.push_back({7, 1, 129, 130, 16, mixed, INT64_MAX, false, false});
  std::istringstream isas(hf_paged_isas());
  for (std::string isa; isas >> isa;) {
    hf_paged_use_isa(isa.c_str());
    for (size_t i = 0; i < cases.size(); ++i)
      for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
        for (Codes codes : {Codes::kNone, Codes::kInt8, Codes::kFloat8})
          if (!run(cases[i], dtype, codes)) {
            printf("NaN in case %zu, dtype %d, codes %d, %s\n", i, int(dtype), int(codes), isa.c_str());
            return 1;
          }
    printf("%s: %zu cases\n", isa.c_str(), 9 * cases.size());
  }
}
