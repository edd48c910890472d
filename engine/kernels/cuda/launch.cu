#include "engine/kernels/cuda/launch.cuh"

#include <algorithm>

namespace lorikeet::cuda {

namespace {

int Attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Of fewer threads where all that compute capability 9.0 has is there when it is compiled: which of a
// build's codes the device took shows in its attributes.
constexpr int kHopperThreads = 64;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__global__ void __launch_bounds__(kHopperThreads) Probe() {}
#else
__global__ void __launch_bounds__(2 * kHopperThreads) Probe() {}
#endif

cudaFuncAttributes ProbeAttributes() {
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, Probe);
  return attributes;
}

}  // namespace

int32_t Multiprocessors() {
  static const int32_t count = std::max(1, Attribute(cudaDevAttrMultiProcessorCount));
  return count;
}

bool StartsEarly() {
  static const bool can = ProbeAttributes().ptxVersion >= 90;
  return can;
}

bool HasHopperCode() {
  static const bool has = ProbeAttributes().maxThreadsPerBlock == kHopperThreads;
  return has;
}

}  // namespace lorikeet::cuda
