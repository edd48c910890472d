// What the kernels that shrink prompts' rows share: which pairs of part and rank tile, rows and columns
// a block and its warps have, and where sums go.
#pragma once

#include "engine/kernels/cuda/low_rank.cuh"
#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::cuda {

inline constexpr int kShrinkWarps = 8;
inline constexpr int kShrinkThreads = 32 * kShrinkWarps;
inline constexpr int kShrinkPairs = 4;   // (part, rank tile) that share a pass over x
inline constexpr int kMostRowTiles = 4;  // of 8 rows, of a warp
inline constexpr int kSumFloats = kPromptTileRows * kTileRanks;  // of one slice of a pair

// What a block does: up to kShrinkPairs pairs of one item over one slice.
struct PromptShrinkTask {
  ExpandItem item;
  int32_t first_pair;
  int32_t pairs;
  int32_t slice;
};

__device__ inline PromptShrinkTask ReadTask(const LowRankArgs& args, int32_t task, int32_t slices,
                                     int32_t groups) {
  PromptShrinkTask out;
  out.slice = task % slices;
  out.item = args.list->expands[task / slices / groups];
  out.first_pair = task / slices % groups * kShrinkPairs;
  out.pairs = min(kShrinkPairs, args.parts * out.item.tiles_per_module - out.first_pair);
  return out;
}

__device__ inline RankTile TileOf(const LowRankArgs& args, const ExpandItem& item, int32_t pair) {
  const int32_t tiles = item.tiles_per_module;
  return item.tiles[int64_t{args.first_module + pair / tiles} * tiles + pair % tiles];
}

// The warp's share: one pair, `row_tiles` groups of eight rows from `first_row`.
struct Share {
  RankTile tile;
  int32_t pair = 0;
  int32_t first_row = 0;
  int32_t row_tiles = 0;
};

__device__ inline Share ShareOf(const LowRankArgs& args, const PromptShrinkTask& work) {
  Share share;
  const int warp = threadIdx.x / 32;
  const int warps = kShrinkWarps / (work.pairs == 1 ? 1 : work.pairs == 2 ? 2 : 4);  // a pair's
  if (warp / warps >= work.pairs) return share;
  share.pair = work.first_pair + warp / warps;
  share.row_tiles = kPromptTileRows / 8 / warps;
  share.first_row = warp % warps * share.row_tiles * 8;
  share.tile = TileOf(args, work.item, share.pair);
  return share;
}

// A lane holds, of each row tile, ranks g and g + 8 of rows 2t and 2t + 1 (vec.cuh's Mma).
__device__ inline void StoreSums(const LowRankArgs& args, const PromptShrinkTask& work, const Share& share,
                                 int32_t slices, const float (&sums)[kMostRowTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t base = int64_t{work.item.first_shrink} * args.parts;
  float* const slot = args.slots + ((base + share.pair) * slices + work.slice) * kSumFloats;
#pragma unroll
  for (int r = 0; r < kMostRowTiles; ++r) {
    if (r >= share.row_tiles) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = share.first_row + r * 8 + 2 * t + i % 2, rank = g + i / 2 * 8;
      slot[row * kTileRanks + rank] = rank < share.tile.ranks ? sums[r][i] : 0;
    }
  }
}

// The shrink where the copy engine can bring x and the factors.
bool CanBringInputs(const LowRankArgs& args);
cudaError_t LaunchShrinkByCopyEngine(const LowRankArgs& args, cudaStream_t stream);

}  // namespace lorikeet::cuda
