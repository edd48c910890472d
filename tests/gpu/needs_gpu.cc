// In every test of tests/gpu: without a device all of it is skipped, and ctest says so.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

namespace lorikeet {
namespace {

class NeedsGpu : public testing::Environment {
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

[[maybe_unused]] const testing::Environment* const environment =
    testing::AddGlobalTestEnvironment(new NeedsGpu);

}  // namespace
}  // namespace lorikeet
