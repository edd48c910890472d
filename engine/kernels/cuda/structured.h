// The parts of an adapted linear that are neither low-rank nor vectors (engine/api/adapter.h defines
// them). Work is found on the device, row by row, so a recorded launch serves any mix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"

namespace lorikeet::cuda {

struct StructuredArgs {
  RowAdapters adapters;  // of x's rows
  ModuleId first_module = 0;
  int32_t parts = 0;
  int32_t out[3] = {};
  Matrix x;  // [rows, in]
  Matrix y;  // [rows, Σ out] x's type or float32
  PartSet used = 0;  // by some adapter: what need not be launched is not
};

// out = R(x) of one module, x where a row has none. [rows, in]
cudaError_t LaunchRotateInputs(const RowAdapters& adapters, ModuleId module, Matrix x, Matrix out,
                               cudaStream_t stream);
// y += S(x).
cudaError_t LaunchAddStructured(const StructuredArgs& args, cudaStream_t stream);
// y = Q(y), then the replaced outputs.
cudaError_t LaunchAdaptOutputs(const StructuredArgs& args, cudaStream_t stream);

}  // namespace lorikeet::cuda
