// The shrink of prompts' rows with what it reads brought by the copy engine: a block's factors whole,
// while the kernel before is at work, and x in stages.
#include <algorithm>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/low_rank_prompt.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kRows = kPromptTileRows;
constexpr int32_t kThreads = kShrinkThreads + 32;  // one more warp brings
constexpr int kStages = 8;                         // of kBoxWidth columns of x
constexpr int32_t kStageBytes = kRows * kBoxRowBytes;

// From one rank's row to the next: eight rows' 16 bytes lie in different banks.
__host__ __device__ constexpr int32_t FactorPitch(int32_t slice_width) { return slice_width * 2 + 16; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct ShrinkBarriers {
  PhaseBarrier full[kStages], empty[kStages], factors;
};

// A warp's: rank rows of the block's pairs, `width` columns from `begin` on.
template <typename T>
__device__ void BringFactors(const LowRankArgs& args, const PromptShrinkTask& work, int32_t begin, int32_t width,
                             int32_t pitch, std::byte* factors, PhaseBarrier* barrier) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t i = lane; i < kShrinkPairs * kTileRanks; i += 32) {
    const int32_t pair = i / kTileRanks, rank = i % kTileRanks;
    if (pair >= work.pairs) break;
    const RankTile tile = TileOf(args, work.item, work.first_pair + pair);
    if (rank >= tile.ranks) continue;
    const RowSpan span = SpanOfA(tile, args.x.width);
    auto* const to = reinterpret_cast<T*>(factors + i * pitch) - begin;
    for (int32_t c = begin; span.width < args.x.width && c < begin + width; c += 8) {
      if (!span.has(c)) *reinterpret_cast<uint4*>(to + c) = kZero;
    }
    const int32_t first = max(begin, span.begin), last = min(begin + width, span.begin + span.width);
    if (first >= last) continue;
    barrier->Expect((last - first) * 2);
    BringBytes(to + first, RankRow<T>(tile.a, tile.a_first, span, rank) + first, (last - first) * 2, *barrier);
  }
  barrier->Arrive();
}

// One thread's.
__device__ inline void BringRows(const CUtensorMap& map, int32_t row, int32_t begin, int32_t steps,
                                 std::byte* stages, ShrinkBarriers* barriers) {
  for (int32_t s = 0; s < steps; ++s) {
    const int32_t at = s % kStages;
    if (s >= kStages) barriers->empty[at].Wait(s / kStages % 2 ^ 1);
    barriers->full[at].ArriveExpecting(kStageBytes);
    BringBox(stages + at * kStageBytes, map, begin + s * kBoxWidth, row, barriers->full[at]);
  }
}

// The warp's pair and rows over one stage. factors: of the pair, from the stage's first column on.
template <typename T>
__device__ void AddStage(const Share& share, uint32_t factors, int32_t pitch, uint32_t stage,
                         float (&sums)[kMostRowTiles][4]) {
  const uint32_t r = threadIdx.x % 8, square = threadIdx.x % 32 / 8;
  const uint32_t a_at = factors + (r + square % 2 * 8) * pitch + square / 2 * 16;
  const uint32_t b_at = stage + (share.first_row + r) * kBoxRowBytes + ((square ^ r) << 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of 32 columns
    uint32_t a[2][4];
    LoadSquares(a_at + half * 64, a[0]);
    LoadSquares(a_at + half * 64 + 32, a[1]);
#pragma unroll
    for (int t = 0; t < kMostRowTiles; ++t) {
      if (t >= share.row_tiles) break;
      uint32_t b[4];
      LoadSquares((b_at + t * 8 * kBoxRowBytes) ^ (half << 6), b);
      Mma<T>(sums[t], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
      Mma<T>(sums[t], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
    }
  }
}

#endif

// Sums over one slice of `in` to slots [shrink item, part, slice].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ShrinkBrought(const __grid_constant__ LowRankArgs args, const __grid_constant__ CUtensorMap map,
                  int32_t slices, int32_t groups) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte shared[];  // stages, then factors
  __shared__ ShrinkBarriers barriers;
  std::byte* const factors = shared + kStages * kStageBytes;
  LetKernelAfterStart();
  const PromptShrinkTask work = ReadTask(args, blockIdx.x, slices, groups);
  if (work.pairs <= 0) return WaitForKernelBefore();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barriers.full[i].Init(1), barriers.empty[i].Init(kShrinkWarps);
    barriers.factors.Init(32);
    PublishBarriers();
  }
  __syncthreads();
  const int32_t slice_width = PromptSliceWidth(args.x.width), pitch = FactorPitch(slice_width);
  const int32_t begin = work.slice * slice_width, width = min(slice_width, args.x.width - begin);
  const int32_t steps = width / kBoxWidth;
  if (threadIdx.x >= kShrinkThreads) {
    BringFactors<T>(args, work, begin, width, pitch, factors, &barriers.factors);
    WaitForKernelBefore();  // factors are none of its
    const int32_t row = work.item.row_begin - args.first_row;
    if (threadIdx.x == kShrinkThreads) BringRows(map, row, begin, steps, shared, &barriers);
    return;
  }
  const Share share = ShareOf(args, work);
  float sums[kMostRowTiles][4] = {};
  barriers.factors.Wait(0);
  const uint32_t of_pair = SharedAddress(factors + (share.pair - work.first_pair) * kTileRanks * pitch);
  for (int32_t s = 0; s < steps; ++s) {
    const int32_t at = s % kStages;
    barriers.full[at].Wait(s / kStages % 2);
    if (share.row_tiles > 0) {
      AddStage<T>(share, of_pair + s * kBoxRowBytes, pitch, SharedAddress(shared + at * kStageBytes), sums);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) barriers.empty[at].Arrive();
  }
  WaitForKernelBefore();  // slots may still be read
  StoreSums(args, work, share, slices, sums);
#endif
}

template <typename T>
cudaError_t LaunchOf(const LowRankArgs& args, cudaStream_t stream) {
  const auto kernel = ShrinkBrought<T>;
  const int32_t in = args.x.width, slices = PromptSlices(in), pairs = args.parts * args.max_tiles;
  const auto shared_bytes = [](int32_t pair_count, int32_t slice_width) {
    return kStages * kStageBytes + pair_count * kTileRanks * FactorPitch(slice_width);
  };
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_bytes(kShrinkPairs, PromptSliceWidth(INT32_MAX)));
  if (allowed != cudaSuccess) return allowed;
  CUtensorMap map;
  const cudaError_t error = MakeBoxMap(args.x.data, args.x.dtype, args.x.rows, in, args.x.stride, kRows, &map);
  if (error != cudaSuccess) return error;
  const int32_t groups = DivideUp(pairs, kShrinkPairs);
  return Launch(kernel,
                {.grid = dim3(args.expected_expands * groups * slices),
                 .threads = kThreads,
                 .shared_bytes = shared_bytes(std::min(pairs, kShrinkPairs), PromptSliceWidth(in))},
                stream, args, map, slices, groups);
}

}  // namespace

bool CanBringInputs(const LowRankArgs& args) {
  return args.x.width % kBoxWidth == 0 && CanMakeBoxMap(args.x.data, args.x.dtype, args.x.stride);
}

cudaError_t LaunchShrinkByCopyEngine(const LowRankArgs& args, cudaStream_t stream) {
  return args.x.dtype == DType::kBF16 ? LaunchOf<BFloat16>(args, stream) : LaunchOf<Half>(args, stream);
}

}  // namespace lorikeet::cuda
