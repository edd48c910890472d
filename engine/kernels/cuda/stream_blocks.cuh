// What products share whose weight streams through shared memory: how sums are laid over a warp
// group, added over a cluster and stored, and the maps of what the copy engine brings.
//
// A block has kBlockRows rows of the weight, which are columns of y, and 8 * kColumns rows of x,
// which are rows of y.
#pragma once

#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/hopper.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int32_t kGroups = 2;      // warp groups of a block
inline constexpr int32_t kGroupRows = 64;  // of the weight, a warp group's
inline constexpr int32_t kBlockRows = kGroups * kGroupRows;
inline constexpr int32_t kComputing = kGroups * 128;  // threads; one more warp brings what they read
inline constexpr int32_t kBoxWidth = 64;              // columns of 16 bits that come as one box
inline constexpr int32_t kBoxRowBytes = kBoxWidth * 2;
inline constexpr int32_t kMaxCluster = 4;

// Calls put(row of the block, row of y, sum) for what a lane holds.
template <int kColumns, typename Put>
__device__ void ForEachSum(const float (&sums)[kColumns * 4], const Put& put) {
  const int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      put(row + e / 2 * 8, j * 8 + lane % 4 * 2 + e % 2, sums[j * 4 + e]);
    }
  }
}

// The sums of a block, [8 * kColumns, kPartialStride] floats: lanes two columns apart find other
// banks.
inline constexpr int32_t kPartialStride = kBlockRows + 4;

template <int kColumns>
__device__ void StorePartial(float* partial, const float (&sums)[kColumns * 4]) {
  ForEachSum<kColumns>(sums, [&](int32_t row, int32_t column, float sum) {
    partial[column * kPartialStride + row] = sum;
  });
}

// Four columns of a row of y at a time.
template <typename Y>
__device__ void StoreFour(Y* to, const float4& v) {
  if constexpr (std::is_same_v<Y, float>) {
    *reinterpret_cast<float4*>(to) = v;
  } else {
    *reinterpret_cast<uint2*>(to) = {Pack2<Y>(v.x, v.y), Pack2<Y>(v.z, v.w)};
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Blocks of a cluster have the same rows of the weight, and each a part of the columns; `threads` of
// each add up a part of the rows over all of them, in their order, and call put(row of the block, row
// of y, sums of four rows). What others added up is there before, and stays until all are done: the
// cluster waits for itself, or the block if it is alone.
template <typename Put>
__device__ void AddOverCluster(const cooperative_groups::cluster_group& cluster, float* partial,
                               int32_t y_rows, int32_t threads, const Put& put) {
  const int32_t blocks = static_cast<int32_t>(cluster.num_blocks());
  const int32_t fours = kBlockRows / blocks / 4;
  const int32_t begin = fours * 4 * static_cast<int32_t>(cluster.block_rank());
  for (int32_t i = threadIdx.x; i < fours * y_rows; i += threads) {
    const int32_t row = begin + i % fours * 4, column = i / fours;
    float4 sum = {};
    for (int32_t b = 0; b < blocks; ++b) {
      // A block's own is nearer by its own address.
      const float* const of_block = blocks == 1 ? partial : cluster.map_shared_rank(partial, b);
      const float4 part = *reinterpret_cast<const float4*>(of_block + column * kPartialStride + row);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    put(row, column, sum);
  }
}

// One thread's: fills a ring of `stages` with `units`, in order, as stages become empty. The weight's
// are asked for before the kernel before has ended. The kernel after may start when all but a ring's
// have been asked for, so that its own first stages come while these are worked on.
template <typename BringWeight, typename BringX>
__device__ void FillRing(int32_t units, int32_t stages, PhaseBarrier* empty,
                         const BringWeight& bring_weight, const BringX& bring_x) {
  const int32_t early = min(units, stages);
  for (int32_t unit = 0; unit < early; ++unit) bring_weight(unit);
  if (units <= 2 * stages) LetKernelAfterStart();
  WaitForKernelBefore();
  for (int32_t unit = 0; unit < early; ++unit) bring_x(unit);
  for (int32_t unit = early; unit < units; ++unit) {
    empty[unit % stages].Wait(unit / stages % 2 ^ 1);
    bring_weight(unit);
    bring_x(unit);
    if (unit == units - stages) LetKernelAfterStart();
  }
}

#endif

// Whether there can be such a map on this device of rows that begin `stride` elements apart.
bool CanMakeBoxMap(const void* data, DType dtype, int64_t stride);

// The map of [rows, width] of a 16-bit type in boxes of kBoxWidth columns and `box_rows` rows. What
// lies outside comes as zeros.
cudaError_t MakeBoxMap(const void* data, DType dtype, int64_t rows, int64_t width, int64_t stride,
                       int32_t box_rows, CUtensorMap* map);

// Blocks that share the columns of each of `blocks`, so that as many are at work as have room, `room`
// on a multiprocessor.
int32_t ClusterFor(int32_t blocks, int32_t room, int32_t units);

}  // namespace lorikeet::cuda
