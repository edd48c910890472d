// Products of a handful of rows with weights of few rows, where a kernel's beginning and end count.
#pragma once

#include <cuda_runtime_api.h>

#include "engine/kernels/args.h"

namespace lorikeet::cuda {

// Whether LaunchSkinnyGemm serves the product, and in less time than stream_gemm.h: at most 8 rows of a 16-bit
// type, so few rows of the weight that two waves of blocks have them; rows of x and of the weight at multiples of
// 16 bytes, their width in whole units of 8.
bool IsSkinny(Matrix weight, Matrix x, Matrix y);

// y = x Wᵀ with float32 sums, the same for a row whatever the others are. weight: [y.width, x.width] of x's
// type; y is of x's type or float32.
//
// Each lane copies what it will multiply to shared memory of its own, the first of it before the kernel before
// has ended: no barrier is waited for but one, by a block's warps, which share the columns of its rows and add up
// at the end.
cudaError_t LaunchSkinnyGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);

}  // namespace lorikeet::cuda
