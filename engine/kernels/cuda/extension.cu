#include "engine/kernels/cuda/extension.h"

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/low_rank.cuh"
#include "engine/kernels/cuda/low_rank_prompt.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

using T = BFloat16;

constexpr int32_t kUnit = 64;  // of columns
constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements of sixteen bytes
constexpr int kGatherColumns = 2 * kThreads;  // of y, that a block takes

__host__ __device__ int32_t GatherBlocks(const LowRankArgs& args) {
  int32_t blocks = 0;
  for (int p = 0; p < args.parts; ++p) blocks += DivideUp(args.out[p], kGatherColumns);
  return blocks;
}

// Sixteen rows of B become columns of f, for some rows of f, with zeros in the other parts' columns.
__device__ void Gather(const LowRankArgs& args, const Extension& extension, int32_t task) {
  const int32_t blocks = GatherBlocks(args);
  const GatherItem item = extension.gathers[task / blocks];
  int32_t block = task % blocks, part = 0, first = 0;
  for (; block >= DivideUp(args.out[part], kGatherColumns); first += args.out[part++]) {
    block -= DivideUp(args.out[part], kGatherColumns);
  }
  const int32_t out = args.out[part], column = block * kGatherColumns + threadIdx.x * 2;
  if (column >= out) return;
  const ModuleId module = args.first_module + part;
  const RankTile tile = item.tiles[int64_t{module} * item.tiles_per_module + item.rank_tile];
  uint32_t b[kTileRanks];  // two columns of each
  const RowSpan span = SpanOfB(tile, out);
#pragma unroll
  for (int k = 0; k < kTileRanks; ++k) {  // rows have a whole number of pairs
    b[k] = 0;
    if (k >= tile.ranks || !span.has(column)) continue;
    b[k] = *reinterpret_cast<const uint32_t*>(RankRow<T>(tile.b, tile.b_first, span, k) + column);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (column + c >= out) break;
    uint32_t pairs[kTileRanks / 2];
#pragma unroll
    for (int i = 0; i < kTileRanks / 2; ++i) {
      pairs[i] = __byte_perm(b[2 * i], b[2 * i + 1], c == 0 ? 0x5410 : 0x7632);
    }
    T* const row = extension.factors.row<T>(first + column + c);
    for (int32_t p = 0; p < args.parts; ++p) {
      const int32_t tile_at = item.tiles_before * args.parts + p * item.tiles_per_module + item.rank_tile;
      auto* const to = reinterpret_cast<uint4*>(row + tile_at * kTileRanks);
      to[0] = p == part ? uint4{pairs[0], pairs[1], pairs[2], pairs[3]} : kZero;
      to[1] = p == part ? uint4{pairs[4], pairs[5], pairs[6], pairs[7]} : kZero;
    }
  }
}

// Where eight columns of a row of v come from.
struct Source {
  const float* slot = nullptr;  // of the first slice; nullptr: they are zeros
  float scale = 0;
};

__device__ Source SourceOf(const LowRankArgs& args, const ExtendedRow& row, int32_t column, int32_t slices) {
  const int32_t pair = column / kTileRanks - row.tiles_begin * args.parts;
  const int32_t tiles = row.tiles_end - row.tiles_begin;
  if (pair < 0 || pair >= tiles * args.parts) return {};
  const ExpandItem item = args.list->expands[row.item_row / kPromptTileRows];
  const ModuleId module = args.first_module + pair / tiles;
  const int64_t at = (int64_t{item.first_shrink} * args.parts + pair) * slices;
  return {args.slots + at * kSumFloats + row.item_row % kPromptTileRows * kTileRanks + column % kTileRanks,
          item.tiles[int64_t{module} * tiles + pair % tiles].scale};
}

// The slices' sums, scaled.
__device__ uint4 ValuesOf(const Source& source, int32_t slices) {
  if (source.slot == nullptr) return kZero;
  const float scale = source.scale;
  const float4 low = AddSlots(source.slot, slices, kSumFloats), high = AddSlots(source.slot + 4, slices, kSumFloats);
  return {Pack2<T>(low.x * scale, low.y * scale), Pack2<T>(low.z * scale, low.w * scale),
          Pack2<T>(high.x * scale, high.y * scale), Pack2<T>(high.z * scale, high.w * scale)};
}

// What is gathered is no other kernel's of the step, so it does not wait for the sums.
__global__ void __launch_bounds__(kThreads)
    FillExtension(const __grid_constant__ LowRankArgs args, const __grid_constant__ Extension extension,
                  int32_t slices) {
  LetKernelAfterStart();
  const int32_t gathers = extension.gather_count * GatherBlocks(args);
  if (blockIdx.x < gathers) return Gather(args, extension, blockIdx.x);
  const int32_t vectors = extension.values.width / kVector;
  const int32_t i = (blockIdx.x - gathers) * kThreads + threadIdx.x;
  const int32_t row = i / vectors, column = i % vectors * kVector;
  Source source;
  if (row < extension.values.rows) source = SourceOf(args, extension.rows[row], column, slices);
  WaitForKernelBefore();
  if (row >= extension.values.rows) return;
  *reinterpret_cast<uint4*>(extension.values.row<T>(row) + column) = ValuesOf(source, slices);
}

cudaError_t Fill(const LowRankArgs& args, const Extension& extension, cudaStream_t stream) {
  const int64_t vectors = int64_t{extension.values.rows} * extension.values.width / kVector;
  const int32_t blocks = extension.gather_count * GatherBlocks(args) + DivideUp(vectors, kThreads);
  return Launch(FillExtension, {dim3(blocks), kThreads}, stream, args, extension,
                PromptSlices(args.x.width));
}

}  // namespace

int32_t ExtensionColumns(std::span<const DeviceSegment> segments, int32_t parts) {
  int32_t tiles = 0;
  for (const DeviceSegment& s : segments) tiles += s.tiles_per_module;
  return DivideUp(int64_t{tiles} * parts * kTileRanks, kUnit) * kUnit;
}

void PlanExtension(std::span<const DeviceSegment> segments, ExtensionPlan* plan) {
  plan->segments.assign(segments.begin(), segments.end());
  plan->gathers.clear();
  int32_t tiles_before = 0;
  for (const DeviceSegment& s : segments) {
    for (int32_t tile = 0; tile < s.tiles_per_module; ++tile) {
      plan->gathers.push_back({s.tiles, static_cast<int16_t>(s.tiles_per_module),
                               static_cast<int16_t>(tile), tiles_before});
    }
    tiles_before += s.tiles_per_module;
  }
}

void DescribeRows(const ExtensionPlan& plan, std::span<ExtendedRow> rows) {
  std::fill(rows.begin(), rows.end(), ExtendedRow());
  int32_t first_item = 0;
  ExtendedRow row;
  for (const DeviceSegment& s : plan.segments) {
    row.tiles_begin = row.tiles_end;
    row.tiles_end = static_cast<int16_t>(row.tiles_end + s.tiles_per_module);
    for (int32_t r = s.row_begin; r < s.row_end; ++r) {
      row.item_row = first_item * kPromptTileRows + r - s.row_begin;
      rows[r] = row;
    }
    first_item += DivideUp(s.row_end - s.row_begin, kPromptTileRows);
  }
}

cudaError_t LaunchExtend(const LowRankArgs& args, const Extension& extension, cudaStream_t stream) {
  if (args.x.dtype != DType::kBF16) return cudaErrorInvalidValue;
  const cudaError_t error = LaunchPromptShrink(args, stream);
  return error != cudaSuccess ? error : Fill(args, extension, stream);
}

}  // namespace lorikeet::cuda
