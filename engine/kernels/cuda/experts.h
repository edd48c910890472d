// Layers with experts on the device: rows are dealt out by the router's scores, each expert multiplies
// its rows at once, and a row sums what its experts give. Nothing of it is known to the host, so that a
// recorded step serves any routing.
//
// A row and one of its experts are a pair; pairs of one expert lie together, at positions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/api/module.h"
#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_image.h"

namespace lorikeet::cuda {

inline constexpr int32_t kMaxExperts = 512;
inline constexpr int32_t kMaxChosenExperts = 32;
inline constexpr int32_t kExpertTileRows = 64;

// Positions [first, first + rows) are `expert`'s.
struct ExpertTile {
  int32_t expert = 0;
  int32_t first = 0;
  int32_t rows = 0;
};

// Device memory. T rows, K experts each. Without tiles, of an adapter's MlpMixture: positions are the
// pairs, row by row, and what a row has less than K has expert -1.
struct Routing {
  int32_t chosen = 0;           // K
  int32_t* experts = nullptr;   // [T, K] ascending
  float* weights = nullptr;     // [T, K]
  int32_t* places = nullptr;    // [T, K] the pair's position
  int32_t* rows = nullptr;      // [T K] by position
  int32_t* tile_count = nullptr;
  ExpertTile* tiles = nullptr;  // [MostTiles]

  // Of `rows` rows over `experts` experts.
  int32_t MostTiles(int32_t row_count, int32_t expert_count) const;
};

// Adapters of the step's rows: row r's tiles are tiles[r].first, by module; nullptr: it has none.
struct RowTiles {
  const RankTile* tiles = nullptr;
  int32_t tiles_per_module = 0;
  int32_t unused = 0;
};

// Fills `routing` as ExpertsArgs says. scores: [T, experts] of any activation type.
cudaError_t LaunchRoute(Matrix scores, bool normalise, const Routing& routing, cudaStream_t stream);

// y[position] = x[position's row, or the position itself without `gather`] Wᵀ, W its expert's of
// weights[expert]: [y.width, x.width] of x's type, rows adjacent.
struct ExpertProduct {
  const void* const* weights = nullptr;  // [experts]
  bool gather = false;
  Matrix x, y;
  int32_t tiles = 0;  // the routing's most
};
cudaError_t LaunchExpertProduct(const ExpertProduct& product, const Routing& routing,
                                cudaStream_t stream);

// The same products' adapters: low-rank pairs, output scales and biases of modules
// first_module + expert * expert_modules + part, each part `out` columns of y.
struct ExpertDeltas {
  const RowTiles* adapters = nullptr;  // [T]
  ModuleId first_module = 0;
  int32_t expert_modules = kLinearsPerExpert;
  int32_t parts = 1;
  int32_t out = 0;
};
cudaError_t LaunchExpertDeltas(const ExpertProduct& product, const ExpertDeltas& deltas,
                               const Routing& routing, cudaStream_t stream);

// out[t] = Σ over t's experts, ascending, of weight · y[position].
cudaError_t LaunchSumExperts(Matrix y, Matrix out, const Routing& routing, cudaStream_t stream);

}  // namespace lorikeet::cuda
