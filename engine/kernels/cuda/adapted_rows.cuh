// What the kernels of adapters' parts share: a few rows at a time, by adapter, so that rows of one
// adapter read its matrices once; a warp an inner product.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int kAdaptedRows = 8;
inline constexpr int kAdaptedThreads = 256;
inline constexpr int kAdaptedWarps = kAdaptedThreads / 32;

// fn(parts, mask) for each of the adapters of rows [begin, begin + kAdaptedRows) below `end`; bit i of
// mask: row begin + i is its.
template <typename Fn>
__device__ void ForEachAdapter(const RowAdapters& rows, int32_t begin, int32_t end, const Fn& fn) {
  const AdapterParts* parts[kAdaptedRows];
  uint32_t left = 0;
#pragma unroll
  for (int i = 0; i < kAdaptedRows; ++i) {
    parts[i] = begin + i < end ? rows.of(begin + i) : nullptr;
    if (parts[i] != nullptr) left |= 1u << i;
  }
  while (left != 0) {
    const AdapterParts* current = nullptr;
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kAdaptedRows; ++i) {
      if ((left >> i & 1) == 0) continue;
      if (current == nullptr) current = parts[i];
      if (parts[i] == current) mask |= 1u << i;
    }
    left &= ~mask;
    fn(*current, mask);
  }
}

// fn(i) for the rows of a mask, i known when compiled.
template <typename Fn>
__device__ void ForEachRow(uint32_t mask, const Fn& fn) {
#pragma unroll
  for (int i = 0; i < kAdaptedRows; ++i) {
    if (mask >> i & 1) fn(i);
  }
}

// This lane's share of w · (row i of a mask), added to sums[i]: load(i, c) is eight elements of the
// row from c. width: a multiple of 8.
template <typename T, typename Load>
__device__ void AddDots(const T* w, int32_t width, uint32_t mask, const Load& load,
                        float (&sums)[kAdaptedRows]) {
  for (int32_t c = threadIdx.x % 32 * 8; c < width; c += 32 * 8) {
    const Vec8<T> weights = LoadVec(w + c);
    ForEachRow(mask, [&](int i) {
      const Vec8<float> values = load(i, c);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i] += ToFloat(weights.v[j]) * values.v[j];
    });
  }
}

template <typename T>
__device__ Vec8<float> LoadWide(const T* p) {
  const Vec8<T> values = LoadVec(p);
  Vec8<float> wide;
#pragma unroll
  for (int j = 0; j < 8; ++j) wide.v[j] = ToFloat(values.v[j]);
  return wide;
}

// store(i, sum of sums[i] over the warp) on one lane, for the rows of a mask.
template <typename Store>
__device__ void StoreSums(uint32_t mask, const float (&sums)[kAdaptedRows], const Store& store) {
  ForEachRow(mask, [&](int i) {
    const float sum = WarpSum(sums[i]);
    if (threadIdx.x % 32 == 0) store(i, sum);
  });
}

}  // namespace lorikeet::cuda
