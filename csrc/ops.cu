// The kernels as torch operations, by torch's stable ABI: one shared object for torch 2.11 and later,
// with or without CUDA in it. Checking arguments is s1fast/matmul.py's work.
#include <dlfcn.h>

#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "gemv.cuh"

using torch::stable::Tensor;

namespace s1fast {

// torch's current stream, or what is wrong. torch's CUDA library is looked up among what is loaded:
// linking to it would tie this object to builds that have it, and a weak symbol would stay null where
// torch loads it privately, so that everything ran on stream 0.
const char* current_stream(int32_t device, void** stream) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return "libtorch_cuda.so is not loaded: this torch has no CUDA";
  const auto getter =
      reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  if (getter == nullptr) return "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream";
  return getter(device, stream) == 0 ? nullptr : "torch could not name its current stream";
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "gemv: ", what, ": ", cudaGetErrorString(error));
}

int processors_of(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

template <bool NORM, bool SWIGLU>
void launch(const Gemv& g, cudaStream_t stream) {
  const auto kernel = gemv_kernel<NORM, SWIGLU, Bf16Weight>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
        "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, SHARED_PERCENT),
        "division of shared memory");
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(g.plan.grid);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, g), "launch");
}

const uint16_t* elements(const std::optional<Tensor>& x) {
  return x ? static_cast<const uint16_t*>(x->data_ptr()) : nullptr;
}

Tensor gemv(const Tensor& x, const Tensor& weight, const Tensor& workspace,
            const std::optional<Tensor>& norm, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const std::optional<Tensor>& live, double eps,
            bool swiglu) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  const char* fault = current_stream(device, &stream);
  STD_TORCH_CHECK(fault == nullptr, "gemv: no stream to run on: ", fault);

  const int slots = int(x.size(0)), width = int(x.size(1));
  const int outputs = int(weight.size(0)) / (swiglu ? 2 : 1);
  const int processors = processors_of(device);
  STD_TORCH_CHECK(workspace.numel() >= workspace_bytes(processors), "gemv: workspace has ",
                  workspace.numel(), " bytes, ", workspace_bytes(processors), " are needed");
  STD_TORCH_CHECK(weight.stride(0) < 1 << 30, "gemv: weight has rows ", weight.stride(0),
                  " elements apart, 2^30 are too many");
  Tensor out = torch::stable::new_empty(x, {slots, outputs});

  Gemv g{};
  g.weight = weight.data_ptr();
  g.x = static_cast<const uint16_t*>(x.data_ptr());
  g.norm = elements(norm);
  g.bias = elements(bias);
  g.residual = elements(residual);
  g.out = static_cast<uint16_t*>(out.data_ptr());
  g.live = live ? static_cast<const int*>(live->data_ptr()) : nullptr;
  g.arrivals = static_cast<int*>(workspace.data_ptr());
  g.partial = reinterpret_cast<float*>(static_cast<char*>(workspace.data_ptr()) +
                                       arrivals_bytes(processors));
  g.weight_stride = weight.stride(0);
  g.x_stride = x.stride(0);
  g.residual_stride = residual ? residual->stride(0) : 0;
  g.out_stride = outputs;
  g.eps = float(eps);
  g.slots = slots;
  g.outputs = outputs;
  g.width = width;
  g.plan = make_plan(outputs, width, swiglu, processors);

  const auto run = norm ? (swiglu ? launch<true, true> : launch<true, false>)
                        : (swiglu ? launch<false, true> : launch<false, false>);
  run(g, static_cast<cudaStream_t>(stream));
  return out;
}

}  // namespace s1fast

// For ctypes: what needs no tensor.
extern "C" {

__attribute__((visibility("default"))) int64_t s1fast_workspace_bytes(int32_t processors) {
  return s1fast::workspace_bytes(processors);
}

// Null, or why there is no stream.
__attribute__((visibility("default"))) const char* s1fast_current_stream(int32_t device,
                                                                         void** stream) {
  return s1fast::current_stream(device, stream);
}

__attribute__((visibility("default"))) s1fast::Plan s1fast_plan(int32_t outputs, int32_t width,
                                                                bool swiglu, int32_t processors) {
  return s1fast::make_plan(outputs, width, swiglu, processors);
}
}

STABLE_TORCH_LIBRARY_FRAGMENT(s1fast, m) {
  m.def(
      "gemv(Tensor x, Tensor weight, Tensor(a!) workspace, Tensor? norm, Tensor? bias, "
      "Tensor? residual, Tensor? live, float eps, bool swiglu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(s1fast, CUDA, m) { m.impl("gemv", TORCH_BOX(&s1fast::gemv)); }
