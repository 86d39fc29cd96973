// A device that is none: tensors of the type "fakegpu" lie in the host's memory, and the CPU's kernels compute on them.
// It is as strict as a GPU: an operator may not mix devices, and what crosses between host and device is counted.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr auto kFake = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

struct Counts {
  std::atomic<int64_t> uploads{0}, downloads{0}, waits{0}, launches{0}, held{0}, limit{-1};
} counts;
thread_local c10::DeviceIndex current = 0;

// ---- Memory -------------------------------------------------------------------------------------------------------

struct Block {
  void* address;
  size_t num_bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  counts.held -= static_cast<int64_t>(block->num_bytes);
  std::free(block->address);
  delete block;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    c10::Device device(kFake, current);
    if (num_bytes == 0) return {nullptr, device};
    int64_t limit = counts.limit, held = counts.held += static_cast<int64_t>(num_bytes);
    if (limit >= 0 && held > limit) {
      counts.held -= static_cast<int64_t>(num_bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "fakegpu out of memory: tried to allocate ", num_bytes, " bytes, ",
                       limit - held + static_cast<int64_t>(num_bytes), " are free");
    }
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 64, num_bytes) == 0, "no memory");
    return {address, new Block{address, num_bytes}, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }
} allocator;

std::mutex pinned_lock;
std::set<std::pair<uintptr_t, uintptr_t>> pinned;  // Begin and end of each pinned block.

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 64, std::max<size_t>(num_bytes, 1)) == 0, "no memory");
    auto begin = reinterpret_cast<uintptr_t>(address);
    std::lock_guard guard(pinned_lock);
    pinned.emplace(begin, begin + num_bytes);
    return {address, new Block{address, num_bytes}, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  static void free_pinned(void* context) {
    auto* block = static_cast<Block*>(context);
    auto begin = reinterpret_cast<uintptr_t>(block->address);
    {
      std::lock_guard guard(pinned_lock);
      pinned.erase({begin, begin + block->num_bytes});
    }
    std::free(block->address);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }
} pinned_allocator;

// ---- What torch asks of a device ----------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device old(kFake, current);
    setDevice(device);
    return old;
  }
  c10::Device getDevice() const override { return {kFake, current}; }
  void setDevice(c10::Device device) const override { current = device.index() < 0 ? current : device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { ++counts.waits; }
  void synchronizeDevice(c10::DeviceIndex) const override { ++counts.waits; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new char;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { ++counts.waits; }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<char*>(event); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(at::kCPU);
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(at::kCPU).clone();
  }
  bool isPinnedPtr(const void* data) const override {
    auto address = reinterpret_cast<uintptr_t>(data);
    std::lock_guard guard(pinned_lock);
    auto after = pinned.upper_bound({address, UINTPTR_MAX});
    return after != pinned.begin() && address < std::prev(after)->second;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

// ---- The same memory as a tensor of the other device ----------------------------------------------------------------

at::Tensor with_storage(c10::DataPtr data, size_t num_bytes, c10::DispatchKey key, const at::Tensor& like) {
  // An operator may give an output another size: then the host allocates, and the result is taken over.
  auto* host = c10::GetAllocator(c10::DeviceType::CPU);
  c10::Storage storage(c10::Storage::use_byte_size_t{}, num_bytes, std::move(data), host, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return result;
}

at::Tensor seen_by(const at::Tensor& tensor, c10::Device device) {
  auto key = device.type() == kFake ? c10::DispatchKey::PrivateUse1 : c10::DispatchKey::CPU;
  auto* kept = new c10::Storage(tensor.storage());
  c10::DataPtr data(tensor.storage().mutable_data_ptr().get(), kept,
                    [](void* context) { delete static_cast<c10::Storage*>(context); }, device);
  auto result = with_storage(std::move(data), tensor.storage().nbytes(), key, tensor);
  if (tensor.is_neg()) result._set_neg(true);
  if (tensor.is_conj()) result._set_conj(true);
  return result;
}

at::Tensor on_host(const at::Tensor& tensor) { return seen_by(tensor, c10::Device(c10::DeviceType::CPU)); }

// ---- Every operator that has no kernel below: the CPU's kernel on the same memory -----------------------------------

bool takes_host_indices(const std::string& name) { return name.find("index") != std::string::npos; }

bool waits(const std::string& name) {
  for (auto* known : {"aten::nonzero", "aten::masked_select", "aten::_unique", "aten::unique", "aten::equal"})
    if (name.rfind(known, 0) == 0) return true;
  return false;
}

struct Call {
  const std::string& name;
  c10::optional<c10::Device> device;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;  // As given, and as the host sees it.

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kFake) {
      host_dims = std::max(host_dims, tensor.dim());
      return tensor;
    }
    TORCH_CHECK(!device || *device == tensor.device(), name, " got tensors on ", *device, " and on ", tensor.device());
    device = tensor.device();
    auto result = on_host(tensor);
    tensors.emplace_back(tensor, result);
    return result;
  }

  void check() const {
    if (host_dims < 1 || tensors.empty()) return;
    TORCH_CHECK(takes_host_indices(name), name, " got tensors on ", *device, " and on the host");
    ++counts.uploads;
  }

  at::Tensor device_result(const at::Tensor& result) const {
    if (!result.defined() || result.device().type() == kFake || !device) return result;
    for (auto& [given, seen] : tensors) {
      if (result.is_same(seen)) return given;
      if (result.storage().data_ptr().get() == seen.storage().data_ptr().get() && result.storage().nbytes()) {
        return at::native::as_strided_tensorimpl(given, result.sizes(), result.strides(), result.storage_offset());
      }
    }
    return seen_by(result, *device);
  }

  int64_t host_dims = 0;
};

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  const size_t num_arguments = schema.arguments().size(), begin = stack->size() - num_arguments;
  Call call{schema.name(), c10::nullopt, {}};
  for (size_t index = begin; index < stack->size(); ++index) {
    auto& value = (*stack)[index];
    if (value.isTensor()) {
      value = call.host(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (auto& tensor : value.toTensorVector()) list.push_back(call.host(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<c10::optional<at::Tensor>> list;
      for (c10::optional<at::Tensor> tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? c10::optional<at::Tensor>(call.host(*tensor)) : c10::nullopt);
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == kFake) {
      if (!call.device) call.device = value.toDevice();
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  call.check();
  ++counts.launches;
  if (waits(call.name)) ++counts.waits;
  op.callBoxed(stack);
  for (size_t index = stack->size() - schema.returns().size(); index < stack->size(); ++index) {
    auto& value = (*stack)[index];
    if (value.isTensor()) {
      value = call.device_result(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (auto& tensor : value.toTensorVector()) list.push_back(call.device_result(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    }
  }
  // A kernel may have given an output another size.
  for (auto& [given, seen] : call.tensors) {
    if (given.sizes() == seen.sizes() && given.strides() == seen.strides()) continue;
    at::Tensor changed = seen_by(seen, given.device());
    given.unsafeGetTensorImpl()->set_storage_and_dtype(changed.storage(), changed.dtype());
    given.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
  }
}

// ---- Kernels of its own ---------------------------------------------------------------------------------------------

at::Tensor empty(c10::SymIntArrayRef size, c10::optional<at::ScalarType> dtype, c10::optional<at::Layout>,
                 c10::optional<at::Device> device, c10::optional<bool>, c10::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kFake, current)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, c10::optional<at::ScalarType> dtype,
                         c10::optional<at::Layout>, c10::optional<at::Device> device, c10::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kFake, current)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  bool from_device = self.device().type() == kFake, to_device = to.device().type() == kFake;
  if (from_device && to_device) {
    ++counts.launches;
  } else {
    ++(to_device ? counts.uploads : counts.downloads);
    bool is_async = non_blocking && at::globalContext().isPinnedPtr((to_device ? self : to).data_ptr(), kFake);
    if (!is_async) ++counts.waits;
  }
  at::Tensor target = to_device ? on_host(to) : to;
  target.copy_(from_device ? on_host(self) : self);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  const_cast<at::Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar item(const at::Tensor& self) {
  ++counts.downloads;
  ++counts.waits;
  return on_host(self).item();
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      c10::optional<c10::SymInt> offset) {
  c10::optional<int64_t> at = offset ? c10::optional<int64_t>(offset->expect_int()) : c10::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  std::vector<int64_t> dense(sizes.size(), 1);
  for (auto dim = static_cast<int64_t>(sizes.size()) - 2; dim >= 0; --dim) dense[dim] = dense[dim + 1] * sizes[dim + 1];
  if (strides.empty()) strides = dense;
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return self;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, c10::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t elements = c10::multiply_integers(sizes);
  if (static_cast<size_t>(elements) * self.itemsize() > self.storage().nbytes()) {
    at::Tensor grown = at::empty(sizes, self.options());
    at::native::as_strided_tensorimpl(grown, {self.numel()}, c10::IntArrayRef({1})).copy_(self.flatten());
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("resize_", resize);
  m.impl("record_stream", record_stream);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY(hf_paged_fake_device, m) {
  m.def("on_host(Tensor tensor) -> Tensor", on_host);
  m.def("on_device(Tensor tensor, int index) -> Tensor", [](const at::Tensor& tensor, int64_t index) {
    return seen_by(tensor, c10::Device(kFake, static_cast<c10::DeviceIndex>(index)));
  });
}

}  // namespace

extern "C" {
void fake_device_register() {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(kFake, &allocator);
}
int64_t fake_device_uploads() { return counts.uploads; }
int64_t fake_device_downloads() { return counts.downloads; }
int64_t fake_device_waits() { return counts.waits; }
int64_t fake_device_launches() { return counts.launches; }
int64_t fake_device_held() { return counts.held; }
void fake_device_limit(int64_t num_bytes) { counts.limit = num_bytes; }
}
