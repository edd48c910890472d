// Operations over rows that are not products: embedding, norm, activation, bias.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"

namespace lorikeet::cuda {

// The adapters' part of a product's y where it was kept apart: the same shape, to be added in the
// rows that are adapted as one of `which` says.
struct Beside {
  Matrix delta;                      // delta.data is nullptr: nothing was kept apart
  const int32_t* adapted = nullptr;  // [T] AdaptedRow
  int32_t which = 0;                 // AdaptedRows that have a delta
};

// out[t] = table row tokens[t] in float32. table: [vocab, D] of `dtype`.
cudaError_t LaunchEmbed(const void* table, DType dtype, const int32_t* tokens, Matrix out,
                        cudaStream_t stream);
// logit_rows: [L] device, for RowSet::kLogits. adapters: of the step's rows; without parts no row has
// a norm of its own. batch_invariant: a row's squares are added in the same order however many rows there are.
cudaError_t LaunchAddRmsNorm(const NormArgs& args, const Beside& beside, const int32_t* logit_rows,
                             const RowAdapters& adapters, bool batch_invariant, cudaStream_t stream);
cudaError_t LaunchSwiGlu(Matrix gate_up, const Beside& beside, Matrix out, cudaStream_t stream);
// y += bias in every row. bias: [width].
cudaError_t LaunchAddBias(Matrix y, const float* bias, cudaStream_t stream);

}  // namespace lorikeet::cuda
