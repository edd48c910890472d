// What tests of the CUDA backend share: its types, and rows on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "engine/kernels/backend.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {

struct TypeCase {
  DType stored;  // of the weights
  Precision precision;
  DType dtype;  // of activations
  double step;  // relative rounding of one value
};
inline constexpr TypeCase kTypes[] = {
    {DType::kBF16, Precision::kFast, DType::kBF16, 0x1p-8},
    {DType::kF16, Precision::kFast, DType::kF16, 0x1p-11},
    {DType::kF32, Precision::kExact, DType::kF32, 0x1p-23},
};

inline std::unique_ptr<Backend> CudaBackendFor(const TypeCase& type, bool record = true,
                                               Quantization quantization = Quantization::kNone,
                                               bool batch_invariant = false) {
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      MakeCudaBackend({.precision = type.precision, .quantization = quantization,
                       .stored = type.stored, .max_rows = 2048, .record = record,
                       .batch_invariant = batch_invariant});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  return *std::move(backend);
}

inline void RoundTo(DType dtype, std::vector<float>* values) {
  for (float& v : *values) {
    if (dtype == DType::kBF16) v = BF16ToFloat(FloatToBF16(v));
    if (dtype == DType::kF16) v = F16ToFloat(FloatToF16(v));
  }
}

inline std::vector<std::byte> Encode(DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(ByteSize(dtype, values.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
      continue;
    }
    const uint16_t bits = dtype == DType::kBF16 ? FloatToBF16(values[i]) : FloatToF16(values[i]);
    std::memcpy(&bytes[2 * i], &bits, 2);
  }
  return bytes;
}

// Rows on the device, and `room` elements behind each; NaN until written.
struct DeviceRows {
  DeviceMemory memory;
  Matrix matrix;

  DeviceRows(Backend* backend, int32_t rows, int32_t width, DType dtype, int32_t room = 0)
      : memory(backend->Allocate(ByteSize(dtype, int64_t{rows} * (width + room)))),
        matrix(memory.get(), rows, width + room, dtype) {
    Write(Poisoned(int64_t{rows} * (width + room)));
    matrix.width = width;
  }
  void Write(const std::vector<float>& values) {
    const std::vector<std::byte> bytes = Encode(matrix.dtype, values);
    const auto pitch = ByteSize(matrix.dtype, matrix.stride), row = ByteSize(matrix.dtype, matrix.width);
    cudaDeviceSynchronize();
    LK_CHECK(cudaMemcpy2D(matrix.data, pitch, bytes.data(), row, row, matrix.rows, cudaMemcpyHostToDevice) ==
             cudaSuccess);
    // The backend's stream waits for no other, and the last of the copy may still be on its way.
    cudaDeviceSynchronize();
  }
  std::vector<float> Read() const {
    const int64_t count = int64_t{matrix.rows} * matrix.width;
    std::vector<std::byte> bytes(ByteSize(matrix.dtype, count));
    const cudaError_t error = cudaDeviceSynchronize();
    LK_CHECK_MSG(error == cudaSuccess, cudaGetErrorString(error));
    const auto pitch = ByteSize(matrix.dtype, matrix.stride), row = ByteSize(matrix.dtype, matrix.width);
    LK_CHECK(cudaMemcpy2D(bytes.data(), row, matrix.data, pitch, row, matrix.rows, cudaMemcpyDeviceToHost) ==
             cudaSuccess);
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) {
      uint16_t bits = 0;
      if (matrix.dtype == DType::kF32) std::memcpy(&values[i], &bytes[4 * i], 4);
      else std::memcpy(&bits, &bytes[2 * i], 2);
      if (matrix.dtype == DType::kBF16) values[i] = BF16ToFloat(bits);
      if (matrix.dtype == DType::kF16) values[i] = F16ToFloat(bits);
    }
    return values;
  }
};

}  // namespace lorikeet
