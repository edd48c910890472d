// Products of many rows, which cost what their arithmetic costs.
#pragma once

#include <cuda_runtime_api.h>

#include "engine/kernels/args.h"

namespace lorikeet::cuda {

// Whether LaunchTileGemm serves the product on this device: compute capability 9.0, a 16-bit type of
// all three, rows of x, y and of the weight at multiples of 16 bytes.
bool CanTile(Matrix weight, Matrix x, Matrix y);

// y = x Wᵀ with float32 sums, each over the columns in their order whatever the other rows are. weight:
// [y.width, x.width] of x's type; y is of x's type.
//
// A block computes 128 columns of y for as many rows of x as divide the rows among multiprocessors
// most evenly; two blocks share what they read of x. Of a block's two warp groups one multiplies
// while the other stores, by turns.
cudaError_t LaunchTileGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);

// y = silu(x Gᵀ) ∘ (x Uᵀ) (Shazeer 2020, SwiGLU), neither product rounded before. weight: [2 · y.width, x.width],
// G's rows, then U's. CanTileGated: CanTile, and y.width in whole units of 64.
bool CanTileGated(Matrix weight, Matrix x, Matrix y);
cudaError_t LaunchGatedTileGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);

}  // namespace lorikeet::cuda
