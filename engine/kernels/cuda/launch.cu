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

}  // namespace

int32_t Multiprocessors() {
  static const int32_t count = std::max(1, Attribute(cudaDevAttrMultiProcessorCount));
  return count;
}

bool StartsEarly() {
  static const bool can = Attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return can;
}

}  // namespace lorikeet::cuda
