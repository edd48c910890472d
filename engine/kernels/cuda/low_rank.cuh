// What the low-rank kernels share on the device.
#pragma once

#include "engine/kernels/cuda/adapter_image.h"
#include "engine/kernels/cuda/gates.h"
#include "engine/kernels/cuda/low_rank.h"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int kBlock = 64;  // columns of B that a warp's tensor-core tiles span

// The columns of a tile's rows that are kept; the others are zero.
struct RowSpan {
  int32_t begin;
  int32_t width;
  int32_t pitch;

  __device__ bool has(int32_t column) const {
    return static_cast<uint32_t>(column - begin) < static_cast<uint32_t>(width);
  }
};

// `width`: of the module.
__device__ inline RowSpan SpanOfA(const RankTile& tile, int32_t width) {
  const int32_t begin = tile.a_begin * 8, pitch = tile.a_pitch * 8;
  return {begin, min(pitch, width - begin), pitch};
}
__device__ inline RowSpan SpanOfB(const RankTile& tile, int32_t width) {
  const int32_t begin = tile.b_begin * 8, pitch = tile.b_pitch * 8;
  return {begin, min(pitch, width - begin), pitch};
}

// Rank row k of a tile; what it has of column c is at [c].
template <typename T>
__device__ const T* RankRow(const void* const (&places)[2], int first, const RowSpan& span, int k) {
  const T* rows = k < first ? static_cast<const T*>(places[0]) + int64_t{k} * span.pitch
                            : static_cast<const T*>(places[1]) + int64_t{k - first} * span.pitch;
  return rows - span.begin;
}

// Scales of the pair of a row's adapter in a part.
struct PairScales {
  const float* rank = nullptr;   // nullptr: 1
  const float* delta = nullptr;  // nullptr: 1
  const int32_t* gate = nullptr;   // with `gates`: a rank's
  const float* gates = nullptr;    // nullptr: 1

  __device__ float of_rank(int32_t k) const {
    const float scale = rank != nullptr ? rank[k] : 1.0f;
    return gates != nullptr ? scale * gates[gate[k]] : scale;
  }
};

// `row` may be none of x's.
__device__ inline PairScales ScalesOf(const LowRankArgs& args, int32_t row, int32_t part) {
  PairScales scales;
  const AdapterParts* adapter = row >= 0 && row < args.x.rows ? args.scaled.of(row) : nullptr;
  if (adapter == nullptr || adapter->modules == nullptr) return scales;
  const ModuleParts& module = adapter->modules[args.first_module + part];
  if (module.rank_scale.rows > 0) scales.rank = module.rank_scale.row<float>(0);
  if (module.delta_scale.rows > 0) scales.delta = module.delta_scale.row<float>(0);
  if (module.rank_gate.rows > 0) {
    scales.gate = module.rank_gate.row<int32_t>(0);
    scales.gates = module.prototypes.rows > 0 ? SharesOf(args.shares, args.parts, row, part)
                                              : args.scaled.gates_of(row) + module.first_gate;
  }
  return scales;
}

// Rows 2t, 2t + 1, 2t + 8, 2t + 9 of a tile's B, eight columns of each 64-column block. kOnce:
// nobody else reads them.
template <typename T, int kBlocks, bool kOnce>
__device__ void LoadColumns(const RankTile& tile, int32_t out, int32_t column,
                            uint4 (&b)[kBlocks][4]) {
  const int t = threadIdx.x % 4;
  const RowSpan span = SpanOfB(tile, out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = 2 * t + i % 2 + i / 2 * 8;
    const T* row = k < tile.ranks ? RankRow<T>(tile.b, tile.b_first, span, k) : nullptr;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const int32_t c = column + n * kBlock;
      const bool there = row != nullptr && span.has(c);
      b[n][i] = !there ? kZero : kOnce ? LoadStreaming(row + c) : LoadCached(row + c);
    }
  }
}

// sums[r] += Bᵀ t over a tile's ranks, for one block of columns. shrunk: {ranks 2t.., 2t + 8..} of
// row g of each row tile. sums[r][j] holds columns 8 g + 2 j, + 1 of rows 2t, 2t + 1.
template <typename T, int kRowTiles>
__device__ void MultiplyColumns(const uint4 (&b)[4], const uint32_t (&shrunk)[kRowTiles][2],
                                float (&sums)[kRowTiles][4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t a0 = PairElement(b[0], b[1], 2 * j), a1 = PairElement(b[0], b[1], 2 * j + 1);
    const uint32_t a2 = PairElement(b[2], b[3], 2 * j), a3 = PairElement(b[2], b[3], 2 * j + 1);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      Mma<T>(sums[r][j], a0, a1, a2, a3, shrunk[r][0], shrunk[r][1]);
    }
  }
}

// The sum of the slices' slots, `stride` floats apart, of four ranks of a row.
__device__ inline float4 AddSlots(const float* slot, int32_t slices, int32_t stride) {
  float4 sum = {};
#pragma unroll 8
  for (int32_t s = 0; s < slices; ++s, slot += stride) {
    const float4 more = *reinterpret_cast<const float4*>(slot);
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return sum;
}

// y = out_scale ∘ (y + delta_scale ∘ delta) + bias over eight columns.
// `half`: which of the rows 2t, 2t + 1 of sums. Without `add`, y was 0.
template <typename Y>
__device__ void UpdateColumns(Y* y, int32_t column, int32_t out, const float (&sums)[4][4],
                              int half, const RankTile& tile, const float* delta_scale, bool add) {
  const auto update = [&](float value, int i) {
    const float delta = sums[i / 2][half + i % 2 * 2];
    value += delta_scale != nullptr ? delta * delta_scale[column + i] : delta;
    if (tile.out_scale != nullptr) value *= tile.out_scale[column + i];
    if (tile.bias != nullptr) value += tile.bias[column + i];
    return value;
  };
  const bool whole = column + 8 <= out && reinterpret_cast<uintptr_t>(y + column) % 16 == 0;
  if (whole) {
    Vec8<Y> values = {};
    if (add) values = LoadVec(y + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) values.v[i] = FromFloat<Y>(update(ToFloat(values.v[i]), i));
    StoreVec(y + column, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < out) {
      y[column + i] = FromFloat<Y>(update(add ? ToFloat(y[column + i]) : 0.0f, i));
    }
  }
}

}  // namespace lorikeet::cuda
