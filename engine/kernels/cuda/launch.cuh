// Kernel launches that may start while the kernel before them ends (see WaitForKernelBefore).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorikeet::cuda {

struct LaunchShape {
  dim3 grid;
  int32_t threads = 0;
  int32_t shared_bytes = 0;
};

// Whether the current device can start a kernel while the one before it ends.
bool StartsEarly();

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = StartsEarly() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

constexpr int32_t DivideUp(int64_t value, int64_t by) {
  return static_cast<int32_t>((value + by - 1) / by);
}

// Multiprocessors of the current device.
int32_t Multiprocessors();

}  // namespace lorikeet::cuda
