// What the sampling kernels share: logits as ordered bits, chunks of a row, and reductions over a
// block whose result does not depend on timing.
#pragma once

#include <cfloat>
#include <cstdint>

#include "engine/kernels/cuda/sample.h"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int kChooseThreads = 512;  // two blocks a multiprocessor
inline constexpr int kChooseWarps = kChooseThreads / 32;
inline constexpr unsigned kAll = ~0u;

// Larger bits have the larger logit; equal logits, -0 and +0 too, have equal bits. Every NaN that
// LargestOf gives is above infinity.
__device__ inline uint32_t Ordered(float logit) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float FromOrdered(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The larger; a positive NaN if either is one.
__device__ inline float LargestOf(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
}

__device__ inline float Element(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The lane's four of chunk c; -inf behind the row's end. Lanes hold the same elements whether the
// row's address allows vectors or not, so that sums do not differ.
template <bool kVector>
__device__ float4 LoadChunk(const float* row, int32_t c, int32_t width) {
  const int32_t i = c * kChunk + static_cast<int32_t>(threadIdx.x % 32) * 4;
  if (kVector && i + 4 <= width) return *reinterpret_cast<const float4*>(row + i);
  float4 v;
  v.x = i < width ? row[i] : -INFINITY;
  v.y = i + 1 < width ? row[i + 1] : -INFINITY;
  v.z = i + 2 < width ? row[i + 2] : -INFINITY;
  v.w = i + 3 < width ? row[i + 3] : -INFINITY;
  return v;
}

// 2^(scale (logit - largest)), 1 for the largest. REQUIRES: largest is finite.
__device__ inline float Weight(float logit, float largest, float scale) {
  return exp2f((logit - largest) * scale);
}

// What weights in a chunk are relative to: its largest logit, if there is one.
__device__ inline float Reference(uint32_t best) { return fmaxf(FromOrdered(best), -FLT_MAX); }

__device__ inline float WeightOf(const float4& x, float largest, float scale) {
  return (Weight(x.x, largest, scale) + Weight(x.y, largest, scale)) +
         (Weight(x.z, largest, scale) + Weight(x.w, largest, scale));
}

// ---- over a block of kChooseThreads; every thread calls these

template <typename T, typename Fn>
__device__ T BlockReduce(T v, const Fn& fn) {
  __shared__ T warps[kChooseWarps];
  for (int offset = 16; offset > 0; offset /= 2) v = fn(v, __shfl_xor_sync(kAll, v, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = warps[threadIdx.x % kChooseWarps];
  for (int offset = kChooseWarps / 2; offset > 0; offset /= 2) v = fn(v, __shfl_xor_sync(kAll, v, offset));
  return v;
}

template <typename T>
__device__ T BlockMax(T v) {
  return BlockReduce(v, [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
__device__ T BlockMin(T v) {
  return BlockReduce(v, [](T a, T b) { return a < b ? a : b; });
}

__device__ inline double BlockSum(double v) {
  return BlockReduce(v, [](double a, double b) { return a + b; });
}

template <typename T>
__device__ T WarpPrefix(T v) {  // sum of this lane's and those before
  for (int offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(kAll, v, offset);
    if (threadIdx.x % 32 >= offset) v += before;
  }
  return v;
}

// Sum of this thread's and those before; `total` of all.
template <typename T>
__device__ T BlockPrefix(T v, T* total) {
  __shared__ T warps[kChooseWarps];  // lanes past them repeat the first
  v = WarpPrefix(v);
  __syncthreads();
  if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = v;
  __syncthreads();
  const T sums = WarpPrefix(warps[threadIdx.x % kChooseWarps]);
  *total = __shfl_sync(kAll, sums, kChooseWarps - 1);
  const int warp = threadIdx.x / 32;
  const T before = __shfl_sync(kAll, sums, warp == 0 ? 0 : warp - 1);
  return warp == 0 ? v : before + v;
}

}  // namespace lorikeet::cuda
