// The ops of kernels/ops.py for the CPU, on torch's stable ABI. Calls that the kernels do not serve go to
// the ops' implementation in torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "copy.h"
#include "isa.h"
#include "latent.h"

// Headers before torch 2.13 lack the check that gives an error of torch its message; theirs names the call alone.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace {

using hf_paged::Attention;
using hf_paged::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using hf_paged::Codes;
using hf_paged::kMaxHeadDim;

void parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  if (count == 1) return body(context, 0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

bool is_contiguous_int64(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous();
}

// Rows may lie apart: those of an engine's steps lie in a wider matrix.
bool has_dense_int64_rows(const Tensor& tensor) {
  return is_contiguous_int64(tensor) ||
         (tensor.scalar_type() == ScalarType::Long && tensor.dim() == 2 && tensor.stride(1) == 1);
}

std::optional<Dtype> native_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

void check_ids(const int64_t* ids, int64_t count, int64_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < limit, what, " ", ids[i], " is not below ", limit);
}

// A slot of -1 is that of padding.
void check_slots(const int64_t* slots, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(slots[i] >= -1 && slots[i] < limit, "slot ", slots[i], " is neither -1 nor from 0 to ", limit - 1);
}

// Runs the op's implementation in torch on the same arguments.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> call_torch(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

void check_caches(const Tensor& key_cache, const Tensor& value_cache) {
  STD_TORCH_CHECK(key_cache.dim() == 4 && value_cache.dim() == 4, "a cache has 4 dimensions");
  for (int dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(key_cache.size(dim) == value_cache.size(dim),
                    "key_cache and value_cache differ in more than head size");
}

hf_paged::Write write_of(const Tensor& states, const Tensor& cache, int64_t num_tokens) {
  STD_TORCH_CHECK(states.dim() == 3 && states.size(0) == num_tokens && states.size(1) == cache.size(1) &&
                      states.size(2) == cache.size(3),
                  "states must be [num_tokens, num_kv_heads, head_dim], as slot_mapping and the cache have them");
  return {static_cast<const char*>(states.const_data_ptr()),
          {states.stride(0), states.stride(1), states.stride(2)},
          static_cast<char*>(cache.mutable_data_ptr()),
          cache.size(1),
          cache.size(2),
          cache.size(3),
          int64_t(cache.element_size())};
}

void check_scales(const Tensor& scales, const Tensor& cache) {
  STD_TORCH_CHECK(scales.dim() == 4 && scales.size(0) == cache.size(0) && scales.size(1) == cache.size(1) &&
                      scales.size(2) == cache.size(2) && scales.size(3) == 1,
                  "scales must be [num_blocks, num_kv_heads, block_size, 1], as their cache has them");
}

void encode_in(hf_paged::Write& write, const Tensor& states, const Tensor& cache, const Tensor& scales, Codes codes) {
  check_scales(scales, cache);
  write.store = hf_paged::codes_in_use()[int(codes)].store;
  write.dtype = *native_dtype(states);
  write.scales = scales.mutable_data_ptr<float>();
}

// What both caches hold beside these scales; nothing if the kernels do not serve it.
std::optional<Codes> codes_of(const Tensor& key_cache, const Tensor& value_cache,
                              const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  if (!key_cache.is_contiguous() || !value_cache.is_contiguous()) return std::nullopt;
  if (!key_scales && !value_scales) return Codes::kNone;
  if (!key_scales || !value_scales || key_cache.scalar_type() != value_cache.scalar_type() ||
      key_cache.size(3) > kMaxHeadDim || value_cache.size(3) > kMaxHeadDim)
    return std::nullopt;
  for (const Tensor* scales : {&*key_scales, &*value_scales})
    if (scales->scalar_type() != ScalarType::Float || !scales->is_contiguous()) return std::nullopt;
  if (key_cache.scalar_type() == ScalarType::Char) return Codes::kInt8;
  if (key_cache.scalar_type() == ScalarType::Float8_e4m3fn) return Codes::kFloat8;
  return std::nullopt;
}

bool can_write(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
               const Tensor& slots, std::optional<Codes> codes) {
  if (!codes || !is_contiguous_int64(slots)) return false;
  if (codes == Codes::kNone)
    return key.scalar_type() == key_cache.scalar_type() && value.scalar_type() == value_cache.scalar_type();
  return native_dtype(key) && native_dtype(value);
}

void write_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
              std::optional<Tensor> key_scales, std::optional<Tensor> value_scales) {
  const auto codes = codes_of(key_cache, value_cache, key_scales, value_scales);
  if (!can_write(key, value, key_cache, value_cache, slot_mapping, codes)) {
    call_torch("hf_paged::write_kv_torch", key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales);
    return;
  }
  check_caches(key_cache, value_cache);
  const int64_t num_tokens = slot_mapping.numel();
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  check_slots(slots, num_tokens, key_cache.size(0) * key_cache.size(2));
  hf_paged::Write writes[] = {write_of(key, key_cache, num_tokens), write_of(value, value_cache, num_tokens)};
  if (codes != Codes::kNone) {
    encode_in(writes[0], key, key_cache, *key_scales, *codes);
    encode_in(writes[1], value, value_cache, *value_scales, *codes);
    writes[0].is_rotated = true;
  }
  hf_paged::write_tokens(writes, 2, slots, num_tokens, parallel);
}

void copy_blocks(Tensor key_cache, Tensor value_cache, Tensor source, Tensor destination) {
  if (!key_cache.is_contiguous() || !value_cache.is_contiguous() || source.scalar_type() != ScalarType::Long ||
      destination.scalar_type() != ScalarType::Long) {
    call_torch("hf_paged::copy_blocks_torch", key_cache, value_cache, source, destination);
    return;
  }
  STD_TORCH_CHECK(source.dim() == 1 && destination.dim() == 1 && source.size(0) == destination.size(0),
                  "source and destination must be as long as each other");
  const int64_t num_copies = source.size(0), num_blocks = key_cache.size(0);
  // Columns of one [num_copies, 2] tensor, as a rule.
  std::vector<int64_t> from(num_copies), to(num_copies);
  for (int64_t i = 0; i < num_copies; ++i) {
    from[i] = source.const_data_ptr<int64_t>()[i * source.stride(0)];
    to[i] = destination.const_data_ptr<int64_t>()[i * destination.stride(0)];
  }
  check_ids(from.data(), num_copies, num_blocks, "source block");
  check_ids(to.data(), num_copies, num_blocks, "destination block");
  std::array<hf_paged::Copy, 2> copies;
  const Tensor* caches[] = {&key_cache, &value_cache};
  for (int i = 0; i < 2; ++i) {
    const int64_t bytes = caches[i]->numel() * int64_t(caches[i]->element_size());
    copies[i] = {static_cast<char*>(caches[i]->mutable_data_ptr()), num_blocks ? bytes / num_blocks : 0};
  }
  hf_paged::copy_blocks(copies.data(), 2, from.data(), to.data(), num_copies, parallel);
}

bool can_attend(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                const Tensor& context_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& sinks,
                std::optional<Codes> codes) {
  return codes && native_dtype(query) &&
         (codes != Codes::kNone || (key_cache.scalar_type() == query.scalar_type() &&
                                    value_cache.scalar_type() == query.scalar_type())) &&
         key_cache.size(3) <= kMaxHeadDim && value_cache.size(3) <= kMaxHeadDim && has_dense_int64_rows(block_tables) &&
         is_contiguous_int64(context_lens) && is_contiguous_int64(cu_seqlens_q) &&
         (!sinks || (sinks->is_contiguous() && native_dtype(*sinks)));
}

std::vector<float> as_floats(const Tensor& sinks) {
  std::vector<float> floats(sinks.numel());
  for (size_t i = 0; i < floats.size(); ++i) switch (sinks.scalar_type()) {
      case ScalarType::Float:
        floats[i] = sinks.const_data_ptr<float>()[i];
        break;
      case ScalarType::BFloat16:
        floats[i] = static_cast<const c10::BFloat16*>(sinks.const_data_ptr())[i];
        break;
      default:
        floats[i] = static_cast<const c10::Half*>(sinks.const_data_ptr())[i];
    }
  return floats;
}

hf_paged::Pages pages_of(const Tensor& cache, const std::optional<Tensor>& scales = std::nullopt) {
  if (scales) check_scales(*scales, cache);
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), int(cache.size(3)),
          scales ? scales->const_data_ptr<float>() : nullptr};
}

void check_rows(const Attention& a, int64_t max_blocks, int64_t num_tokens, int64_t num_blocks) {
  STD_TORCH_CHECK(a.cu_seqlens_q[0] == 0 && a.cu_seqlens_q[a.num_rows] == num_tokens,
                  "cu_seqlens_q must count from 0 to the ", num_tokens, " query tokens");
  for (int64_t row = 0; row < a.num_rows; ++row) {
    STD_TORCH_CHECK(a.cu_seqlens_q[row] <= a.cu_seqlens_q[row + 1], "cu_seqlens_q falls after row ", row);
    const int64_t blocks = (a.context_lens[row] + a.block_size - 1) / a.block_size;
    STD_TORCH_CHECK(blocks <= max_blocks, "row ", row, " has ", a.context_lens[row],
                    " tokens, its block table holds ", max_blocks, " blocks");
    check_ids(a.block_tables + row * a.table_stride, blocks, num_blocks, "block");
  }
}

// [sizes], in the dtype of `like`.
Tensor new_tensor(const Tensor& like, const int64_t (&sizes)[3], const int64_t (&strides)[3]) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(3, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor context_lens,
                       Tensor cu_seqlens_q, double scale, std::optional<int64_t> window, std::optional<double> softcap,
                       std::optional<Tensor> sinks, std::optional<Tensor> key_scales,
                       std::optional<Tensor> value_scales) {
  const auto codes = codes_of(key_cache, value_cache, key_scales, value_scales);
  if (!can_attend(query, key_cache, value_cache, block_tables, context_lens, cu_seqlens_q, sinks, codes)) {
    auto stack = call_torch("hf_paged::paged_attention_torch", query, key_cache, value_cache, block_tables,
                            context_lens, cu_seqlens_q, scale, window, softcap, sinks, key_scales, value_scales);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  check_caches(key_cache, value_cache);
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), num_kv_heads = key_cache.size(1);
  const int64_t num_rows = context_lens.numel(), value_dim = value_cache.size(3);
  STD_TORCH_CHECK(query.dim() == 3 && query.size(2) == key_cache.size(3) && num_heads % num_kv_heads == 0,
                  "query must be [num_tokens, num_heads, key_dim], num_heads a multiple of ", num_kv_heads);
  STD_TORCH_CHECK(block_tables.dim() == 2 && block_tables.size(0) == num_rows && cu_seqlens_q.numel() == num_rows + 1,
                  "block_tables, context_lens and cu_seqlens_q must speak of the same rows");
  STD_TORCH_CHECK(!sinks || sinks->numel() == num_heads, "sinks must be one per head");
  const int64_t sizes[] = {num_tokens, num_heads, value_dim}, strides[] = {num_heads * value_dim, value_dim, 1};
  Tensor out = new_tensor(query, sizes, strides);
  const std::vector<float> sink_scores = sinks ? as_floats(*sinks) : std::vector<float>();
  const Attention attention{*native_dtype(query),
                            query.const_data_ptr(),
                            {query.stride(0), query.stride(1), query.stride(2)},
                            out.mutable_data_ptr(),
                            pages_of(key_cache, key_scales),
                            pages_of(value_cache, value_scales),
                            block_tables.const_data_ptr<int64_t>(),
                            block_tables.stride(0),
                            context_lens.const_data_ptr<int64_t>(),
                            cu_seqlens_q.const_data_ptr<int64_t>(),
                            num_rows,
                            int(num_heads),
                            int(num_kv_heads),
                            int(key_cache.size(2)),
                            float(scale),
                            window.value_or(INT64_MAX),
                            float(softcap.value_or(0)),
                            sinks ? sink_scores.data() : nullptr,
                            *codes};
  check_rows(attention, block_tables.size(1), num_tokens, key_cache.size(0));
  const hf_paged::Work work = codes == Codes::kNone ? hf_paged::work_in_use()[int(attention.dtype)]
                                                    : hf_paged::codes_in_use()[int(*codes)].work;
  hf_paged::attend(attention, work, int(torch::stable::get_num_threads()), parallel);
  return out;
}

Tensor write_and_attend(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                        Tensor slot_mapping, Tensor block_tables, Tensor context_lens, Tensor cu_seqlens_q,
                        double scale, std::optional<int64_t> window, std::optional<double> softcap,
                        std::optional<Tensor> sinks, std::optional<Tensor> key_scales,
                        std::optional<Tensor> value_scales) {
  write_kv(key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales);
  return paged_attention(query, key_cache, value_cache, block_tables, context_lens, cu_seqlens_q, scale, window,
                         softcap, sinks, key_scales, value_scales);
}

bool can_attend_latents(const Tensor& query_latent, const Tensor& query_rope, const Tensor& latent_cache,
                        const Tensor& rope_cache, const Tensor& block_tables, const Tensor& context_lens,
                        const Tensor& cu_seqlens_q) {
  for (const Tensor* part : {&query_rope, &latent_cache, &rope_cache})
    if (part->scalar_type() != query_latent.scalar_type()) return false;
  for (const Tensor* cache : {&latent_cache, &rope_cache})
    if (!cache->is_contiguous() || cache->size(3) > hf_paged::kMaxRank) return false;
  return native_dtype(query_latent) && has_dense_int64_rows(block_tables) && is_contiguous_int64(context_lens) &&
         is_contiguous_int64(cu_seqlens_q);
}

Tensor latent_attention(Tensor query_latent, Tensor query_rope, Tensor latent_cache, Tensor rope_cache,
                        Tensor block_tables, Tensor context_lens, Tensor cu_seqlens_q, double scale,
                        std::optional<int64_t> window) {
  if (!can_attend_latents(query_latent, query_rope, latent_cache, rope_cache, block_tables, context_lens,
                          cu_seqlens_q)) {
    auto stack = call_torch("hf_paged::latent_attention_torch", query_latent, query_rope, latent_cache, rope_cache,
                            block_tables, context_lens, cu_seqlens_q, scale, window);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  check_caches(latent_cache, rope_cache);
  const int64_t num_tokens = query_latent.size(0), num_heads = query_latent.size(1), rank = latent_cache.size(3);
  const int64_t num_rows = context_lens.numel();
  STD_TORCH_CHECK(latent_cache.size(1) == 1, "latents have one head, the cache has ", latent_cache.size(1));
  for (const auto& [query, cache] : {std::pair(&query_latent, &latent_cache), std::pair(&query_rope, &rope_cache)})
    STD_TORCH_CHECK(query->dim() == 3 && query->size(0) == num_tokens && query->size(1) == num_heads &&
                        query->size(2) == cache->size(3),
                    "queries must be [num_tokens, num_heads, rank] and [num_tokens, num_heads, rope_dim]");
  STD_TORCH_CHECK(block_tables.dim() == 2 && block_tables.size(0) == num_rows && cu_seqlens_q.numel() == num_rows + 1,
                  "block_tables, context_lens and cu_seqlens_q must speak of the same rows");
  const int64_t sizes[] = {num_tokens, num_heads, rank}, strides[] = {num_heads * rank, rank, 1};
  Tensor out = new_tensor(query_latent, sizes, strides);
  const auto attention = [&](const Tensor& query, const Tensor& cache) {
    hf_paged::Pages pages = pages_of(cache);
    pages.head_stride = 0;
    return Attention{*native_dtype(query),
                     query.const_data_ptr(),
                     {query.stride(0), query.stride(1), query.stride(2)},
                     out.mutable_data_ptr(),
                     pages,
                     pages,
                     block_tables.const_data_ptr<int64_t>(),
                     block_tables.stride(0),
                     context_lens.const_data_ptr<int64_t>(),
                     cu_seqlens_q.const_data_ptr<int64_t>(),
                     num_rows,
                     int(num_heads),
                     hf_paged::latent_groups(int(num_heads)),
                     int(cache.size(2)),
                     float(scale),
                     window.value_or(INT64_MAX),
                     0,
                     nullptr};
  };
  const hf_paged::LatentAttention call{attention(query_latent, latent_cache), attention(query_rope, rope_cache)};
  check_rows(call.latents, block_tables.size(1), num_tokens, latent_cache.size(0));
  hf_paged::attend(call, hf_paged::latent_work_in_use()[int(call.latents.dtype)],
                   int(torch::stable::get_num_threads()), parallel);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(hf_paged, CPU, library) {
  library.impl("write_kv", TORCH_BOX(&write_kv));
  library.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
  library.impl("write_and_attend", TORCH_BOX(&write_and_attend));
  library.impl("latent_attention", TORCH_BOX(&latent_attention));
}

}  // namespace
