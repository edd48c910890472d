// Proves the CUDA build until the backend is here.
#include <cublasLt.h>
#include <cuda_bf16.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/kernels/backend.h"

namespace lorikeet {
namespace {

__global__ void Scale(__nv_bfloat16* x, float factor, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = __float2bfloat16(__bfloat162float(x[i]) * factor);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions&) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  Scale<<<1, 32>>>(nullptr, 2.0f, 0);
  return absl::UnimplementedError(absl::StrCat("CUDA: ", devices, " devices, ",
                                               cudaGetErrorString(found), ", cuBLASLt ",
                                               cublasLtGetVersion()));
}

}  // namespace lorikeet
