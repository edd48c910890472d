// Kernel launches that may start while the kernel before them ends (see WaitForKernelBefore).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorikeet::cuda {

struct LaunchShape {
  dim3 grid;
  int32_t threads = 0;
  int32_t shared_bytes = 0;
  int32_t cluster = 1;  // blocks that reach each other's shared memory
};

// Whether kernels, as the current device runs them, wait for the one before where they must: only then
// may they start while that one ends. What is translated for the device from code for 8.0 does not.
bool StartsEarly();
// Whether they are compiled for 9.0a: hopper.cuh is theirs.
bool HasHopperCode();

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = !StartsEarly() ? 0 : shape.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

constexpr int32_t DivideUp(int64_t value, int64_t by) {
  return static_cast<int32_t>((value + by - 1) / by);
}

// Multiprocessors of the current device.
int32_t Multiprocessors();

// Threads of each of `blocks`, half as many of them where blocks are many: then more blocks are there at a time.
inline int32_t FewerForMany(int32_t blocks, int32_t threads) {
  return blocks > 2 * Multiprocessors() && threads % 64 == 0 ? threads / 2 : threads;
}

}  // namespace lorikeet::cuda
