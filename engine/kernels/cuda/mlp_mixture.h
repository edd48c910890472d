// Adapters that deal tokens out among LoRAs of MLPs: MlpMixture of engine/api/adapter.h. A row and one of
// its LoRAs are a pair (engine/kernels/cuda/experts.h); the MLP's products take the pairs as rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"
#include "engine/kernels/cuda/experts.h"

namespace lorikeet::cuda {

// Fills the experts, weights and rows of `routing`, which has no tiles, for `count` of the step's rows, whose
// adapters have mixtures. taken[pair] = x[row].
cudaError_t LaunchDealToLoras(const RowAdapters& adapters, int32_t layer, const int32_t* rows, int32_t count, Matrix x,
                              const Routing& routing, Matrix taken, cudaStream_t stream);

// out[row] = Σ over its pairs of weight · y[pair], of `count` rows.
cudaError_t LaunchSumLoras(Matrix y, int32_t count, const Routing& routing, Matrix out, cudaStream_t stream);

}  // namespace lorikeet::cuda
