#include "engine/kernels/cuda/low_rank.h"

#include <algorithm>

#include "engine/api/limits.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;                       // elements of `in` that a warp takes at a time
constexpr int kStepsInFlight = 8;
constexpr int kWarpSlice = kStep * kStepsInFlight;
constexpr int kSlice = kWarps * kWarpSlice;     // elements of `in` a shrink task takes
constexpr int kBlock = 64;                      // columns an expand warp takes at a time
// Blocks a warp takes: registers hold the sums of kRowTiles · 8 rows.
template <int kRowTiles>
constexpr int kWarpBlocks = kRowTiles == 1 ? 2 : 1;
template <int kRowTiles>
constexpr int kTaskColumns = kWarps * kWarpBlocks<kRowTiles> * kBlock;
constexpr uint4 kZero = {0, 0, 0, 0};

// Rank row k of a tile.
template <typename T>
__device__ const T* RankRow(const void* const (&places)[2], int first, int64_t pitch, int k) {
  return k < first ? static_cast<const T*>(places[0]) + k * pitch
                   : static_cast<const T*>(places[1]) + (k - first) * pitch;
}

// ---- shrink

struct ShrinkTask {
  ShrinkItem item;
  RankTile tile;
  int32_t slice;
};

__device__ ShrinkTask ReadShrink(const LowRankArgs& args, int32_t task, int32_t slices) {
  ShrinkTask out;
  const int32_t sub = task % (args.parts * slices);
  out.item = args.list->shrinks[task / (args.parts * slices)];
  const ModuleId module = args.first_module + sub / slices;
  out.tile = out.item.tiles[int64_t{module} * out.item.tiles_per_module + out.item.rank_tile];
  out.slice = sub % slices;
  return out;
}

template <typename T, int kRowTiles>
__device__ void LoadRankRows(const RankTile& tile, int32_t in, int32_t column,
                             uint4 (&a)[kStepsInFlight][2]) {
  const int g = threadIdx.x % 32 / 4;
  const int64_t pitch = (int64_t{in} + 7) / 8 * 8;
  const T* low = g < tile.ranks ? RankRow<T>(tile.a, tile.a_first, pitch, g) : nullptr;
  const T* high = g + 8 < tile.ranks ? RankRow<T>(tile.a, tile.a_first, pitch, g + 8) : nullptr;
#pragma unroll
  for (int s = 0; s < kStepsInFlight; ++s) {
    const int32_t c = column + s * kStep;
    // A segment of many tiles reads the same factors again and again: let those stay in cache.
    const auto load = [&](const T* row) {
      if (row == nullptr || c >= in) return kZero;
      return kRowTiles == 1 ? LoadStreaming(row + c) : LoadCached(row + c);
    };
    a[s][0] = load(low);
    a[s][1] = load(high);
  }
}

// Sums of the four warps, [row][rank], to the task's slot.
template <int kRowTiles>
__device__ void StoreSums(const float (&sums)[kRowTiles][4], float* slot) {
  constexpr int kPad = kTileRanks + 1;
  __shared__ float shared[kWarps][kRowTiles * 8 * kPad];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = r * 8 + 2 * t + i % 2, rank = g + i / 2 * 8;
      shared[warp][row * kPad + rank] = sums[r][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int row = r * 8 + threadIdx.x / kTileRanks, rank = threadIdx.x % kTileRanks;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w][row * kPad + rank];
    slot[row * kTileRanks + rank] = sum;
  }
  __syncthreads();
}

// Columns [slice * kSlice, ...) of 16 ranks against the item's rows. A segment's factors do not
// depend on the kernel before, so the first task's are fetched while that still runs.
template <typename T, int kRowTiles>
__global__ void __launch_bounds__(kThreads) Shrink(const LowRankArgs args, int32_t slices) {
  const int32_t tasks = args.list->shrink_count * args.parts * slices;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int32_t in = args.x.width;
  bool waited = false;
  LetKernelAfterStart();
  for (int32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const ShrinkTask work = ReadShrink(args, task, slices);
    const int32_t column = work.slice * kSlice + warp * kWarpSlice + t * 8;
    uint4 a[kStepsInFlight][2];
    if (work.tile.ranks > 0) LoadRankRows<T, kRowTiles>(work.tile, in, column, a);
    if (!waited) WaitForKernelBefore();
    waited = true;
    if (work.tile.ranks == 0) continue;
    float sums[kRowTiles][4] = {};
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int32_t row = work.item.row_begin + r * 8 + g - args.first_row;
      const bool mine = r * 8 + g < work.item.rows && row >= 0 && row < args.x.rows;
      const T* x = mine ? args.x.row<T>(row) : nullptr;
#pragma unroll
      for (int s = 0; s < kStepsInFlight; ++s) {
        const int32_t c = column + s * kStep;
        const uint4 values = x != nullptr && c < in ? LoadCached(x + c) : kZero;
        MmaRows<T>(sums[r], a[s][0], a[s][1], values);
      }
    }
    StoreSums<kRowTiles>(sums, args.slots + int64_t{task} * kRowTiles * 8 * kTileRanks);
  }
  if (!waited) WaitForKernelBefore();
}

// ---- expand

struct ExpandTask {
  ExpandItem item;
  int32_t part;
  int32_t part_column;   // first of the task in its part
  int32_t first_column;  // of the part in y
};

template <int kRowTiles>
__device__ ExpandTask ReadExpand(const LowRankArgs& args, int32_t task, int32_t blocks) {
  ExpandTask out;
  out.item = args.list->expands[task / blocks];
  int32_t block = task % blocks;
  out.part = 0;
  out.first_column = 0;
  while (true) {
    const int32_t part_blocks = DivideUp(args.out[out.part], kTaskColumns<kRowTiles>);
    if (block < part_blocks) break;
    block -= part_blocks;
    out.first_column += args.out[out.part++];
  }
  out.part_column = block * kTaskColumns<kRowTiles>;
  return out;
}

// Rows 2t, 2t + 1, 2t + 8, 2t + 9 of a tile's B, eight columns of each block.
template <typename T, int kRowTiles>
__device__ void LoadColumns(const RankTile& tile, int32_t out, int32_t column,
                            uint4 (&b)[kWarpBlocks<kRowTiles>][4]) {
  const int t = threadIdx.x % 4;
  const int64_t pitch = (int64_t{out} + 7) / 8 * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = 2 * t + i % 2 + i / 2 * 8;
    const T* row = k < tile.ranks ? RankRow<T>(tile.b, tile.b_first, pitch, k) : nullptr;
#pragma unroll
    for (int n = 0; n < kWarpBlocks<kRowTiles>; ++n) {
      const int32_t c = column + n * kBlock;
      const bool there = row != nullptr && c < out;
      b[n][i] = !there ? kZero : kRowTiles == 1 ? LoadStreaming(row + c) : LoadCached(row + c);
    }
  }
}

// The slices' sums of rows g of each row tile, scaled, as the product's second operand.
template <typename T, int kRowTiles>
__device__ void LoadShrunk(const float* slot, int32_t slices, float scale,
                           uint32_t (&shrunk)[kRowTiles][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    float2 low = {0, 0}, high = {0, 0};
    for (int32_t s = 0; s < slices; ++s) {
      const float* row = slot + int64_t{s} * kRowTiles * 8 * kTileRanks + (r * 8 + g) * kTileRanks;
      const float2 a = *reinterpret_cast<const float2*>(row + 2 * t);
      const float2 b = *reinterpret_cast<const float2*>(row + 2 * t + 8);
      low.x += a.x, low.y += a.y, high.x += b.x, high.y += b.y;
    }
    shrunk[r][0] = Pack2<T>(low.x * scale, low.y * scale);
    shrunk[r][1] = Pack2<T>(high.x * scale, high.y * scale);
  }
}

// y = out_scale ∘ (y + delta) + bias over eight columns.
template <typename Y>
__device__ void UpdateColumns(Y* y, int32_t column, int32_t out, const float (&delta)[8],
                              const float* out_scale, const float* bias) {
  const auto update = [&](float value, int i) {
    value += delta[i];
    if (out_scale != nullptr) value *= out_scale[column + i];
    if (bias != nullptr) value += bias[column + i];
    return value;
  };
  const bool whole = column + 8 <= out && reinterpret_cast<uintptr_t>(y + column) % 16 == 0;
  if (whole) {
    Vec8<Y> values = LoadVec(y + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) values.v[i] = FromFloat<Y>(update(ToFloat(values.v[i]), i));
    StoreVec(y + column, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < out) y[column + i] = FromFloat<Y>(update(ToFloat(y[column + i]), i));
  }
}

template <typename T, typename Y, int kRowTiles>
__device__ void StoreColumns(const LowRankArgs& args, const ExpandTask& work, const RankTile& tile,
                             int32_t column, const float (&sums)[kRowTiles][kWarpBlocks<kRowTiles>][4][4]) {
  const int t = threadIdx.x % 4;
  const int32_t out = args.out[work.part];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t local = r * 8 + 2 * t + half;
      const int32_t row = work.item.row_begin + local - args.first_row;
      if (local >= work.item.rows || row < 0 || row >= args.y.rows) continue;
#pragma unroll
      for (int n = 0; n < kWarpBlocks<kRowTiles>; ++n) {
        const int32_t c = column + n * kBlock;
        if (c >= out) continue;
        float delta[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          delta[2 * j] = sums[r][n][j][half];
          delta[2 * j + 1] = sums[r][n][j][half + 2];
        }
        UpdateColumns(args.y.row<Y>(row) + work.first_column, c, out, delta, tile.out_scale,
                      tile.bias);
      }
    }
  }
}

template <typename T, typename Y, int kRowTiles>
__global__ void __launch_bounds__(kThreads)
    Expand(const LowRankArgs args, int32_t slices, int32_t blocks) {
  const int32_t tasks = args.list->expand_count * blocks;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  bool waited = false;
  LetKernelAfterStart();
  for (int32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const ExpandTask work = ReadExpand<kRowTiles>(args, task, blocks);
    const RankTile* tiles = work.item.tiles +
                            int64_t{args.first_module + work.part} * work.item.tiles_per_module;
    const int32_t column = work.part_column + warp * kWarpBlocks<kRowTiles> * kBlock + g * 8;
    const int32_t out = args.out[work.part];
    RankTile tile = tiles[0];
    const int32_t tile_count = tile.module_tiles;
    uint4 b[kWarpBlocks<kRowTiles>][4];
    if (tile_count > 0) LoadColumns<T, kRowTiles>(tile, out, column, b);
    if (!waited) WaitForKernelBefore();
    waited = true;
    if (tile_count == 0 && tile.out_scale == nullptr && tile.bias == nullptr) continue;
    float sums[kRowTiles][kWarpBlocks<kRowTiles>][4][4] = {};
    for (int32_t i = 0; i < tile_count; ++i) {
      uint32_t shrunk[kRowTiles][2];
      const int64_t slot =
          (int64_t{work.item.first_shrink + i} * args.parts + work.part) * slices;
      LoadShrunk<T, kRowTiles>(args.slots + slot * kRowTiles * 8 * kTileRanks, slices, tile.scale,
                               shrunk);
#pragma unroll
      for (int n = 0; n < kWarpBlocks<kRowTiles>; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t a0 = PairElement(b[n][0], b[n][1], 2 * j);
          const uint32_t a1 = PairElement(b[n][0], b[n][1], 2 * j + 1);
          const uint32_t a2 = PairElement(b[n][2], b[n][3], 2 * j);
          const uint32_t a3 = PairElement(b[n][2], b[n][3], 2 * j + 1);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            Mma<T>(sums[r][n][j], a0, a1, a2, a3, shrunk[r][0], shrunk[r][1]);
          }
        }
      }
      if (i + 1 == tile_count) break;
      tile = tiles[i + 1];
      LoadColumns<T, kRowTiles>(tile, out, column, b);
    }
    StoreColumns<T, Y, kRowTiles>(args, work, tiles[0], column, sums);
  }
  if (!waited) WaitForKernelBefore();
}

// ---- float32

// A block is one row of an item and one part.
__global__ void LowRankFloat(const LowRankArgs args) {
  extern __shared__ float shrunk[];  // [rank]
  WaitForKernelBefore();
  const int32_t items = args.list->expand_count;
  const int32_t part = blockIdx.y, in = args.x.width, out = args.out[part];
  int32_t first_column = 0;
  for (int32_t p = 0; p < part; ++p) first_column += args.out[p];
  for (int32_t unit = blockIdx.x; unit < items * args.tile_rows; unit += gridDim.x) {
    const ExpandItem item = args.list->expands[unit / args.tile_rows];
    const int32_t local = unit % args.tile_rows;
    const int32_t row = item.row_begin + local - args.first_row;
    if (local >= item.rows || row < 0 || row >= args.x.rows) continue;
    const RankTile* tiles =
        item.tiles + int64_t{args.first_module + part} * item.tiles_per_module;
    const float* x = args.x.row<float>(row);
    const int32_t tile_count = tiles[0].module_tiles;
    for (int32_t k = threadIdx.x / 32; k < tile_count * kTileRanks; k += blockDim.x / 32) {
      const RankTile& tile = tiles[k / kTileRanks];
      if (k % kTileRanks >= tile.ranks) continue;
      const float* a = RankRow<float>(tile.a, tile.a_first, RowPitch(in), k % kTileRanks);
      float sum = 0;
      for (int32_t i = threadIdx.x % 32; i < in; i += 32) sum += x[i] * a[i];
      sum = WarpSum(sum);
      if (threadIdx.x % 32 == 0) shrunk[k] = sum * tile.scale;
    }
    __syncthreads();
    float* y = args.y.row<float>(row) + first_column;
    for (int32_t c = threadIdx.x; c < out; c += blockDim.x) {
      float sum = 0;
      for (int32_t k = 0; k < tile_count * kTileRanks; ++k) {
        const RankTile& tile = tiles[k / kTileRanks];
        if (k % kTileRanks >= tile.ranks) continue;
        sum += shrunk[k] * RankRow<float>(tile.b, tile.b_first, RowPitch(out), k % kTileRanks)[c];
      }
      float value = y[c] + sum;
      if (tiles[0].out_scale != nullptr) value *= tiles[0].out_scale[c];
      if (tiles[0].bias != nullptr) value += tiles[0].bias[c];
      y[c] = value;
    }
    __syncthreads();
  }
}

// As many blocks as the device holds at a time, no more than there are likely to be tasks.
template <auto kKernel>
dim3 Grid(int64_t tasks) {
  static const int64_t most = [] {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0);
    return int64_t{blocks} * Multiprocessors();
  }();
  return dim3(static_cast<uint32_t>(std::clamp<int64_t>(tasks, 1, most)));
}

template <typename Fn>
cudaError_t WithTileRows(int32_t tile_rows, const Fn& fn) {
  if (tile_rows == kDecodeTileRows) return fn.template operator()<kDecodeTileRows / 8>();
  return fn.template operator()<kPromptTileRows / 8>();
}

}  // namespace

int32_t ShrinkSlices(int32_t in) { return DivideUp(in, kSlice); }

int64_t SlotFloats(int64_t shrinks, int32_t parts, int32_t in, int32_t tile_rows) {
  return shrinks * parts * ShrinkSlices(in) * tile_rows * kTileRanks;
}

void PlanLowRank(const std::vector<DeviceSegment>& segments, LowRankWork* work) {
  work->shrinks.clear();
  work->expands.clear();
  // Few rows make few tasks: small tiles spread them, though more of them read the same factors.
  constexpr int32_t kMostDecodeRows = 256;
  int32_t rows = 0;
  for (const DeviceSegment& s : segments) rows += s.row_end - s.row_begin;
  const bool many = rows > kMostDecodeRows &&
                    rows > kDecodeTileRows * static_cast<int32_t>(segments.size());
  work->tile_rows = many ? kPromptTileRows : kDecodeTileRows;
  for (const DeviceSegment& s : segments) {
    for (int32_t row = s.row_begin; row < s.row_end; row += work->tile_rows) {
      const int32_t rows = std::min(work->tile_rows, s.row_end - row);
      work->expands.push_back({s.tiles, row, rows, s.tiles_per_module,
                               static_cast<int32_t>(work->shrinks.size())});
      for (int32_t tile = 0; tile < s.tiles_per_module; ++tile) {
        work->shrinks.push_back({s.tiles, row, static_cast<int16_t>(rows),
                                 static_cast<int16_t>(tile), s.tiles_per_module});
      }
    }
  }
}

cudaError_t LaunchShrink(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t slices = ShrinkSlices(args.x.width);
  const int64_t tasks = int64_t{args.expected_shrinks} * args.parts * slices;
  return WithTileRows(args.tile_rows, [&]<int kRowTiles>() {
    const auto launch = [&]<typename T>(T) {
      constexpr auto kKernel = Shrink<T, kRowTiles>;
      return Launch(kKernel, {Grid<kKernel>(tasks), kThreads}, stream, args, slices);
    };
    return args.x.dtype == DType::kBF16 ? launch(BFloat16()) : launch(Half());
  });
}

cudaError_t LaunchExpand(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t slices = ShrinkSlices(args.x.width);
  return WithTileRows(args.tile_rows, [&]<int kRowTiles>() {
    int32_t blocks = 0;
    for (int32_t p = 0; p < args.parts; ++p) {
      blocks += DivideUp(args.out[p], kTaskColumns<kRowTiles>);
    }
    const int64_t tasks = int64_t{args.expected_expands} * blocks;
    const auto launch = [&]<typename T, typename Y>(T, Y) {
      constexpr auto kKernel = Expand<T, Y, kRowTiles>;
      return Launch(kKernel, {Grid<kKernel>(tasks), kThreads}, stream, args, slices, blocks);
    };
    const bool wide = args.y.dtype == DType::kF32;
    if (args.x.dtype == DType::kBF16) {
      return wide ? launch(BFloat16(), 0.0f) : launch(BFloat16(), BFloat16());
    }
    return wide ? launch(Half(), 0.0f) : launch(Half(), Half());
  });
}

cudaError_t LaunchLowRankFloat(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t rows = std::clamp(args.expected_expands * args.tile_rows, 1, 4096);
  const LaunchShape shape{dim3(rows, args.parts), 256, Limits::kMaxAdapterRank * sizeof(float)};
  return Launch(LowRankFloat, shape, stream, args);
}

}  // namespace lorikeet::cuda
