#include "engine/kernels/cuda/stream_blocks.cuh"

#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {

bool CanMakeBoxMap(const void* data, DType dtype, int64_t stride) {
  const bool narrow = dtype == DType::kBF16 || dtype == DType::kF16;
  return narrow && stride % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && HasHopperCode();
}

cudaError_t MakeBoxMap(const void* data, DType dtype, int64_t rows, int64_t width, int64_t stride,
                    int32_t box_rows, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kBoxWidth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, type, 2, const_cast<void*>(data), extent, row_bytes, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int32_t ClusterFor(int32_t blocks, int32_t room, int32_t units) {
  int32_t cluster = kMaxCluster;
  while (cluster > 1 && (blocks * cluster > room * Multiprocessors() || cluster > units)) {
    cluster /= 2;
  }
  return cluster;
}

}  // namespace lorikeet::cuda
