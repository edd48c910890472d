// Segmented-gather low-rank products: y[r] += scale · (x[r] Aᵀ) Bᵀ with each row's own adapter, at
// each module's own rank, for all parts of a fused linear in two launches.
//
//   shrink  a task is 16 ranks of one part, a slice of `in`, and a few rows of one adapter; its
//           sums go to a slot of its own, so results depend on nothing that runs beside it
//   expand  a task is a block of a part's columns and the same rows; it adds up the slices, runs
//           through all the module's ranks, and applies the adapter's output scale and bias;
//           modules of many ranks are left to a launch more, in steps that have such
//
// For prompts a shrink task takes 64 rows and up to 64 ranks, which may be of several parts, so that
// x is read once for them; the slices are added up before expand, by a launch of their own.
//
// Work lists are on the device and hold what there is, so a recorded launch serves any mix. The
// idea of gathering by segment is Punica's (Chen et al. 2023) and S-LoRA's (Sheng et al. 2023).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_image.h"

namespace lorikeet::cuda {

// Rows of one adapter that a task takes: few for decoding, where rows differ in their adapter, many
// for prompts, where a segment is long.
inline constexpr int32_t kDecodeTileRows = 8;
inline constexpr int32_t kPromptTileRows = 64;
inline constexpr int32_t kMaxParts = 3;

// Tiles of a module, ranks up to 64, beyond which expanding is shared by the warps of a block.
inline constexpr int32_t kFewTiles = 4;

struct alignas(16) ShrinkItem {
  const RankTile* tiles = nullptr;  // [module * tiles_per_module + tile]
  int32_t row_begin = 0;
  int16_t rows = 0;
  int16_t rank_tile = 0;
  int32_t tiles_per_module = 0;
};

struct alignas(16) ExpandItem {
  const RankTile* tiles = nullptr;
  int32_t row_begin = 0;
  int32_t rows = 0;
  int32_t tiles_per_module = 0;
  int32_t first_shrink = 0;  // its rank tile i is shrink item first_shrink + i
};

struct DeviceSegment {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  const RankTile* tiles = nullptr;
  int32_t tiles_per_module = 0;
};

// The work of one set of rows.
struct LowRankWork {
  int32_t tile_rows = kDecodeTileRows;
  int32_t max_tiles = 0;  // of a module, over the adapters
  std::vector<ShrinkItem> shrinks;
  std::vector<ExpandItem> expands;
};
void PlanLowRank(const std::vector<DeviceSegment>& segments, int32_t tile_rows, LowRankWork* work);

// The same on the device.
struct LowRankList {
  int32_t shrink_count = 0;
  int32_t expand_count = 0;
  const ShrinkItem* shrinks = nullptr;
  const ExpandItem* expands = nullptr;
};

// Device pointers.
struct LowRankArgs {
  const LowRankList* list = nullptr;
  int32_t tile_rows = kDecodeTileRows;
  int32_t expected_shrinks = 0;  // about the list's counts, for the size of a launch
  int32_t expected_expands = 0;
  float* slots = nullptr;       // at least SlotFloats()
  int32_t max_tiles = 0;        // prompts: the most tiles_per_module of an item
  bool long_ranks = false;      // a module of an item may have more than kFewTiles
  ModuleId first_module = 0;
  int32_t parts = 0;
  int32_t out[kMaxParts] = {};
  Matrix x;               // [rows, in]
  Matrix y;               // [rows, Σ out] activation type or float32
  bool add = true;        // to y; false: y's rows that have an adapter become the delta alone
  int32_t first_row = 0;  // x row 0 is row `first_row` of the items' rows
  RowAdapters scaled;     // of x's rows, whose ranks and deltas may have scales; without parts: none has
  const float* shares = nullptr;  // of x's rows, where an adapter of theirs has prototypes: LaunchShares made them
};

// Slices that shrink cuts `in` into: a function of the width alone, so that a row's sums are added
// in the same order whatever else is in the batch.
int32_t ShrinkSlices(int32_t in);
constexpr int32_t PromptSliceWidth(int32_t in) { return in <= 8192 ? 512 : 1024; }
constexpr int32_t PromptSlices(int32_t in) { return (in + PromptSliceWidth(in) - 1) / PromptSliceWidth(in); }
int64_t SlotFloats(int64_t shrinks, int32_t parts, int32_t in, int32_t tile_rows);

// x.dtype is the type of A and B.
cudaError_t LaunchShrink(const LowRankArgs& args, cudaStream_t stream);
cudaError_t LaunchExpand(const LowRankArgs& args, cudaStream_t stream);
// What these two come to with tiles of kPromptTileRows; the counts are exact. Sums lie in slots
// [shrink item, part, PromptSlices, kPromptTileRows, kTileRanks]; LaunchPromptSum adds the slices.
cudaError_t LaunchPromptShrink(const LowRankArgs& args, cudaStream_t stream);
cudaError_t LaunchPromptSum(const LowRankArgs& args, cudaStream_t stream);
cudaError_t LaunchPromptExpand(const LowRankArgs& args, cudaStream_t stream);
// float32 throughout: both in one plain kernel.
cudaError_t LaunchLowRankFloat(const LowRankArgs& args, cudaStream_t stream);

}  // namespace lorikeet::cuda
