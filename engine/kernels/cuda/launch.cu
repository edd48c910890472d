#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {

int32_t Multiprocessors() {
  static const int32_t count = [] {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value > 0 ? value : 1;
  }();
  return count;
}

}  // namespace lorikeet::cuda
