// The device a backend runs on.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/statusor.h"

namespace lorikeet::cuda {

// The current device. FAILED_PRECONDITION names what is missing: a driver, a device, or code for it
// in this build.
absl::StatusOr<cudaDeviceProp> FindDevice();

// What CUDA says to a kernel of this build being loaded on the current device.
cudaError_t LoadAKernel();

}  // namespace lorikeet::cuda
