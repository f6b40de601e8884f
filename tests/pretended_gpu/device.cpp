// A pretended GPU: tensors that say cuda:0 and lie in the memory of the CPU.
//
// An operation first checks that all its tensors are on this GPU, as CUDA does, and then runs the CPU's kernel on the
// same memory. What would make Python wait for a GPU (`item`, copies from and to the CPU, shapes that depend on values)
// is refused while a CUDA graph is being recorded. PRETENDED_GPUS (default 1) is the number of GPUs; a process may use
// only the one with the number LOCAL_RANK.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

namespace {

int variable(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}
const c10::Device GPU(c10::DeviceType::CUDA, variable("LOCAL_RANK", 0));
const c10::DeviceIndex GPUS = variable("PRETENDED_GPUS", 1);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
std::atomic<bool> recording = false;

void waits(const std::string& what) {
  TORCH_CHECK(!recording, "operation not permitted when stream is capturing: ", what);
}

// ------------------------------------------------------------------------------------------------
// What PyTorch asks of a device: how many there are, memory, streams and events. There is one stream, and its work is
// always finished.

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  const c10::Stream stream = c10::Stream(c10::Stream::DEFAULT, GPU);
  c10::DeviceIndex deviceCount() const noexcept override { return GPUS; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {start, start, &std::free, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

struct CUDAHooks : at::CUDAHooksInterface {  // the registry looks up this class name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return GPUS; }
  c10::DeviceIndex current_device() const override { return GPU.index(); }
  c10::DeviceIndex getCurrentDevice() const override { return GPU.index(); }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return GPU.index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return GPU.index(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math, which is made of ordinary operations
}
struct ChooseAttention {
  ChooseAttention() { at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&plain_attention); }
} choose_attention;

// ------------------------------------------------------------------------------------------------
// Tensors.

bool on_gpu(const Tensor& t) { return t.defined() && t.device().is_cuda(); }

Tensor on_cpu(const Tensor& t) {  // the same memory
  if (!on_gpu(t)) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  TORCH_CHECK(t.storage().nbytes() > 0, "this memory has been freed");
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
}

Tensor moved(const Tensor& t) {  // a copy
  if (!t.defined() || on_gpu(t)) return t;
  Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, KEYS, t.scalar_type());
  if (t.numel()) on_cpu(out).copy_(t);
  return out;
}

// Stricter than CUDA: virft.py never uses another process's GPU, so doing that is a mistake.
void check_mine(std::optional<at::Device> device) {
  bool mine = !device || !device->has_index() || device->index() == GPU.index();
  TORCH_CHECK(mine, *device, " belongs to another process than this one of ", GPU);
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_mine(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  check_mine(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  if (on_gpu(self) != on_gpu(source)) waits(on_gpu(self) ? "copy to the GPU" : "copy to the CPU");
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

at::Scalar item(const Tensor& self) {
  waits("item");
  return on_cpu(self).item();
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, at::Storage source, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

void resize_storage(const Tensor& t, int64_t bytes) {
  at::native::resize_bytes_cpu(t.storage().unsafeGetStorageImpl(), bytes);
}

// ------------------------------------------------------------------------------------------------
// Every other operation.

// Their results reach Python, or have a shape that depends on values: CUDA waits.
const std::set<std::string> READS_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave",  "aten::equal",         "aten::bincount"};

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t n = schema.arguments().size(), first = stack->size() - n;
  bool gpu = false, cpu = false;
  std::vector<std::pair<Tensor, Tensor>> written;  // a tensor of the GPU, and what stands for it on the CPU
  auto stand_in = [&](const Tensor& t, bool write) {
    if (on_gpu(t)) gpu = true;
    else if (t.defined() && t.dim() > 0) cpu = true;  // without dimensions: CUDA's operations take numbers of the CPU
    Tensor own = on_cpu(t);
    if (write && on_gpu(t)) written.emplace_back(t, own);
    return own;
  };
  for (size_t i = 0; i < n; i++) {
    c10::IValue& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool write = alias && alias->isWrite();
    if (value.isTensor()) {
      value = stand_in(value.toTensor(), write);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(stand_in(t, write));
      value = list;
    } else if (value.isOptionalTensorList()) {  // indices: CUDA takes them from the CPU too, by a copy, which waits
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList()) {
        if (t && t->defined()) {
          if (!on_gpu(*t)) waits(name + " by indices on the CPU");
          if (t->scalar_type() == at::kBool) waits(name + " by a mask");
          t = on_cpu(*t);
        }
        list.push_back(t);
      }
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(!(gpu && cpu), "Expected all tensors to be on the same device, but found ", GPU, " and cpu in ", name);
  if (READS_VALUES.count(name)) waits(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [tensor, own] : written) {
    if (own.sizes() != tensor.sizes()) {  // an out= tensor that the kernel has resized
      at::native::resize_output(tensor, own.sizes());
      on_cpu(tensor).copy_(own);
    }
  }
  auto result = [&](const Tensor& t) {
    for (auto& [tensor, own] : written)
      if (t.defined() && own.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return tensor;
    return gpu ? moved(t) : t;
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(result(t));
      value = list;
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  // These choose a kernel by the device of the tensors, and CUDA's is not in this build.
  for (const char* name : {"convolution", "_convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY(pretended_gpu, m) {
  m.def("on_cpu(Tensor(a) t) -> Tensor(a)", &on_cpu);
  m.def("resize_storage(Tensor t, int bytes) -> ()", &resize_storage);
  m.def("record(bool on) -> ()", [](bool on) { recording = on; });
}
