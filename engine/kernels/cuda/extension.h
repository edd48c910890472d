// Low-rank deltas of long segments as more columns of the base product:
//     y = [x | v] [W | f]ᵀ
// v has what a row of x shrinks to in columns of its segment's own, and zeros in those of others; f has
// these segments' columns of B. The sums never leave the product, where a delta computed apart is
// written and read again, which takes as long as a fifth of the product. v and f lie behind the rows of
// x and W, so that one product of the library's does it all.
//
// Segment s of n rank tiles, before which others have b, has columns [b · parts, (b + n) · parts) · 16,
// a part after the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::cuda {

// Columns of v and f there is room for, behind `width` of x and W.
inline constexpr int32_t kLeastExtendedWidth = 1024;
constexpr int32_t ExtensionRoom(int32_t width) { return width < kLeastExtendedWidth ? 0 : width < 4096 ? 64 : 128; }

// Columns of the extension that these segments have, in whole units of 64.
int32_t ExtensionColumns(std::span<const DeviceSegment> segments, int32_t parts);

// A rank tile of a segment's.
struct alignas(16) GatherItem {
  const RankTile* tiles = nullptr;  // [module * tiles_per_module + tile]
  int16_t tiles_per_module = 0;
  int16_t rank_tile = 0;
  int32_t tiles_before = 0;
};

// Of a row of x, in an extension; no tiles: the row has no columns of its own.
struct ExtendedRow {
  int16_t tiles_begin = 0, tiles_end = 0;  // counted over the segments
  int32_t item_row = 0;                    // kPromptTileRows · its expand item + the row in that
};

struct ExtensionPlan {
  std::vector<GatherItem> gathers;
  std::vector<DeviceSegment> segments;
};
// `segments` in the order of their rows.
void PlanExtension(std::span<const DeviceSegment> segments, ExtensionPlan* plan);
// rows: as many as the step has.
void DescribeRows(const ExtensionPlan& plan, std::span<ExtendedRow> rows);

// Device pointers.
struct Extension {
  Matrix values;   // v: [rows, columns]
  Matrix factors;  // f: [Σ out, columns], finite everywhere
  const ExtendedRow* rows = nullptr;
  const GatherItem* gathers = nullptr;
  int32_t gather_count = 0;
};

// Fills v and f, in bfloat16: float16's factors may have overflowed to infinity, which other segments' zeros would
// not take away. `args` are of the plan's segments, in tiles of kPromptTileRows.
cudaError_t LaunchExtend(const LowRankArgs& args, const Extension& extension, cudaStream_t stream);

}  // namespace lorikeet::cuda
