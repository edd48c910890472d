#include "engine/kernels/cuda/find_device.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "engine/kernels/cuda/cuda_status.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kSharedBytes = 144 << 10;  // the most a kernel of this folder takes, rounded up

// "13.0"
std::string Version(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

// CUDA calls a missing driver an old one.
absl::Status NoDevice(cudaError_t error) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  std::string why = error == cudaSuccess ? "none is there" : cudaGetErrorString(error);
  if (driver == 0) {
    why = "there is no NVIDIA driver";
  } else if (error == cudaErrorInsufficientDriver) {
    why = absl::StrCat("the NVIDIA driver is made for CUDA ", Version(driver),
                       "; this build needs one for ", Version(CUDART_VERSION));
  }
  return absl::FailedPreconditionError(absl::StrCat("no CUDA device can be used: ", why));
}

}  // namespace

absl::StatusOr<cudaDeviceProp> FindDevice() {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) return NoDevice(found);
  cudaDeviceProp device;
  cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess) return ToStatus(error, "the device's properties");
  const std::string has = absl::StrCat(device.name, " has compute capability ", device.major, ".",
                                       device.minor);
  if (device.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat(has, "; 8.0 or newer is needed"));
  }
  // 8.6 and 8.9 run what is built for 8.0 but lack room for attention's pages.
  if (static_cast<int64_t>(device.sharedMemPerBlockOptin) < kSharedBytes) {
    return absl::FailedPreconditionError(
        absl::StrCat(has, " and ", device.sharedMemPerBlockOptin, " bytes of shared memory a block; ",
                     kSharedBytes, " are needed"));
  }
  error = LoadAKernel();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // or the next launch would report it
    return absl::FailedPreconditionError(
        absl::StrCat(has, ", which this build has no code for: CMAKE_CUDA_ARCHITECTURES names the "
                     "devices it is made for"));
  }
  if (error != cudaSuccess) return ToStatus(error, "the first kernel");
  return device;
}

}  // namespace lorikeet::cuda
