// Gates by token of adapters that are several LoRAs one below the other, made by a linear of its own
// input: PrototypeGates of engine/api/adapter.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/api/limits.h"
#include "engine/api/module.h"
#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"

namespace lorikeet::cuda {

// Of a row and a part: [Limits::kMaxExperts] shares, of which those of the adapter's LoRAs are set.
template <typename Float>
constexpr Float* SharesOf(Float* shares, int32_t parts, int32_t row, int32_t part) {
  return shares + (int64_t{row} * parts + part) * Limits::kMaxExperts;
}

struct ShareArgs {
  RowAdapters adapters;  // of x's rows
  ModuleId first_module = 0;
  int32_t parts = 0;
  Matrix x;                 // [rows, in]
  float* shares = nullptr;  // of rows whose adapter has prototypes for the part
};
cudaError_t LaunchShares(const ShareArgs& args, cudaStream_t stream);

}  // namespace lorikeet::cuda
