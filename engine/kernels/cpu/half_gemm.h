// The product over 16-bit weights, written once for every instruction set. Included by the files
// that define an Isa:
//   Sum, Weights        vectors of kLanes float32 sums, of kLanes weights ready to multiply
//   kLanes, kMostRows   rows whose sums fit the registers, two tiles of them
//   Element             of x
//   Load(p), Input(x, step), MultiplyAdd(weights, input, sum), Store(sum, columns, y)
#pragma once

#include <algorithm>

#include "engine/base/check.h"
#include "engine/kernels/cpu/half_weight.h"
#include "engine/kernels/cpu/unroll.h"

namespace lorikeet {

// Columns that a product over one row takes at a time, in as many sums as hide their latency.
inline constexpr int32_t kHalfColumns = 32;
// What is prefetched while a tile is read: measured on weights that come from memory.
inline constexpr int64_t kBytesAhead = 4096;

// kTiles adjacent tiles by kRows rows. Every sum is in the order of the inputs, whatever the block.
template <typename Isa, int kTiles, int kRows>
void HalfBlock(const HalfWeight& w, Matrix x, int32_t row, int32_t tile, Matrix y) {
  const std::byte* weights = w.tile(tile);
  const int64_t tile_bytes = w.tile_bytes();
  const auto* inputs = x.row<typename Isa::Element>(row);
  const int32_t steps = w.steps();
  typename Isa::Sum sums[kTiles][kRows];
  Unroll<kTiles * kRows>([&](auto i) LK_INLINE { sums[i / kRows][i % kRows] = Isa::Zero(); });
  for (int32_t k = 0; k < steps; ++k, weights += Isa::kStepBytes) {
    typename Isa::Weights v[kTiles];
    Unroll<kTiles>([&](auto t) LK_INLINE {
      const std::byte* at = weights + t * tile_bytes;
      __builtin_prefetch(at + kBytesAhead);
      v[t] = Isa::Load(at);
    });
    Unroll<kRows>([&](auto m) LK_INLINE {
      const auto input = Isa::Input(inputs + m * x.stride, k);
      Unroll<kTiles>([&](auto t) LK_INLINE {
        sums[t][m] = Isa::MultiplyAdd(v[t], input, sums[t][m]);
      });
    });
  }
  Unroll<kTiles>([&](auto t) LK_INLINE {
    const int32_t column = (tile + t) * Isa::kLanes;
    Unroll<kRows>([&](auto m) LK_INLINE {
      Isa::Store(sums[t][m], std::min(w.out - column, Isa::kLanes), y.row(row + m) + column);
    });
  });
}

// Rows [row, ...) in blocks of kRows; returns the first row left over.
template <typename Isa, int kTiles, int kRows>
int32_t HalfRows(const HalfWeight& w, Matrix x, int32_t row, int32_t tile_begin, int32_t tile_end,
                 Matrix y) {
  for (; row + kRows <= x.rows; row += kRows) {
    int32_t t = tile_begin;
    for (; t + kTiles <= tile_end; t += kTiles) HalfBlock<Isa, kTiles, kRows>(w, x, row, t, y);
    for (; t < tile_end; ++t) HalfBlock<Isa, 1, kRows>(w, x, row, t, y);
  }
  return row;
}

template <typename Isa>
void HalfGemm(const HalfWeight& w, Matrix x, int32_t tile_begin, int32_t tile_end, Matrix y) {
  LK_CHECK(w.lanes == Isa::kLanes && w.step_bytes() == Isa::kStepBytes);
  constexpr int kFew = kHalfColumns / Isa::kLanes;
  int32_t row = HalfRows<Isa, 2, Isa::kMostRows>(w, x, 0, tile_begin, tile_end, y);
  if constexpr (Isa::kMostRows > 8) row = HalfRows<Isa, 2, 8>(w, x, row, tile_begin, tile_end, y);
  row = HalfRows<Isa, 2, 4>(w, x, row, tile_begin, tile_end, y);
  row = HalfRows<Isa, kFew, 2>(w, x, row, tile_begin, tile_end, y);
  HalfRows<Isa, kFew, 1>(w, x, row, tile_begin, tile_end, y);
}

}  // namespace lorikeet
