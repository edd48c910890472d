// What adapters change outside linears (engine/api/adapter.h defines it), row by row; work is found on
// the device, so a recorded launch serves any mix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"
#include "engine/kernels/cuda/attention.h"

namespace lorikeet::cuda {

// As LaunchEmbed, with each row's adapter; token -1 - k is its k-th virtual one.
cudaError_t LaunchAdaptedEmbed(const void* table, DType dtype, const int32_t* tokens,
                               const RowAdapters& adapters, Matrix out, cudaStream_t stream);
// Keys and values of virtual tokens that have some, over what RopeStore kept.
cudaError_t LaunchStorePrefix(const int32_t* tokens, const RowAdapters& adapters, int32_t layer,
                              int32_t rows, const KvStep& step, cudaStream_t stream);
// args.out += the attention to prompts of the adapters' own.
cudaError_t LaunchPromptAttention(const AttentionArgs& args, int32_t kv_heads, int32_t head_dim,
                                  const RowAdapters& adapters, cudaStream_t stream);
// inner: [rows, D] float32, scratch.
cudaError_t LaunchBottlenecks(const BottleneckArgs& args, const RowAdapters& adapters, float* inner,
                              cudaStream_t stream);

}  // namespace lorikeet::cuda
