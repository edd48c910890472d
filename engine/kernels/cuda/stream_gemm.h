// Products of few rows, which cost what reading the weight costs.
#pragma once

#include <cuda_runtime_api.h>

#include "engine/kernels/args.h"

namespace lorikeet::cuda {

// Whether LaunchStreamGemm serves the product on this device: at most kMaxStreamedRows rows of a
// 16-bit type, rows of x and of the weight at multiples of 16 bytes, compute capability 9.0.
inline constexpr int32_t kMaxStreamedRows = 64;
bool CanStream(Matrix weight, Matrix x);

// Up to so many rows it takes less time than cuBLASLt's products; with more, up to
// kMaxStreamedRows, only gated, or beside other kernels, which it leaves more room.
inline constexpr int32_t kFewRows = 32;

// y = x Wᵀ with float32 sums, the same for a row whatever the others are. weight: [y.width, x.width]
// of x's type; y is of x's type or float32. in_chains: each sum is one chain of products in the order of
// columns, as in tile_gemm.h, though fewer blocks are at work; else several may share a sum's columns.
//
// The weight comes through rings of shared memory, which are filled before the kernel before has
// ended: what is read then is the weight alone.
cudaError_t LaunchStreamGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, bool in_chains = false);

// y = silu(x Gᵀ) ∘ (x Uᵀ) (Shazeer 2020, SwiGLU), neither product rounded before. weight: [2 · y.width, x.width],
// G's rows, then U's; y is of x's type.
cudaError_t LaunchGatedStreamGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);

}  // namespace lorikeet::cuda
