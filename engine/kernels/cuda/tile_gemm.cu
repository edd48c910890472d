#include "engine/kernels/cuda/tile_gemm.h"

#include <algorithm>

#include "engine/kernels/cuda/extension.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"

namespace lorikeet::cuda {
namespace {

// A tile is kTileRows rows of the weight, which are columns of y, by kColumns * 8 rows of x. Gated, one half of
// them are gate's rows and the other up's of the same columns, so that a thread has both of what it combines. The two
// blocks of a cluster have the same rows of x, of which each brings half to both: the second-level
// cache could not keep up with twice as much.
constexpr int32_t kTileRows = 128;
constexpr int32_t kCluster = 2;
constexpr int32_t kMultiplying = 2;  // warp groups; one more brings what they read
constexpr int32_t kWeightBytes = kTileRows * kBoxRowBytes;
constexpr int32_t kSharedBytes = 226 << 10;  // of a multiprocessor, but for barriers
constexpr int32_t kMaxStages = 8;
// What is brought before the kernel before has ended are columns of W, not of what that puts behind them.
static_assert(kMaxStages * kBoxWidth <= kLeastExtendedWidth);

template <int kColumns, bool kGated>
struct Tile {
  static constexpr int32_t kYColumns = kGated ? kGroupRows : kTileRows;
  static constexpr int32_t kBoxRows = kYColumns;  // of the weight
  // A row of a finished tile: lanes that store columns of eight rows find other banks.
  static constexpr int32_t kStagedStride = kYColumns + 8;
  static constexpr int32_t kXRows = kColumns * 8;
  static constexpr int32_t kXBytes = kXRows * kBoxRowBytes;
  static constexpr int32_t kStageBytes = kWeightBytes + kXBytes;
  static constexpr int32_t kStagedBytes = kXRows * kStagedStride * 2;
  static constexpr int32_t kStages = std::min(kMaxStages, (kSharedBytes - kStagedBytes) / kStageBytes);
};

struct TileArgs {
  Matrix y;
  int32_t units = 0;     // stages' worth of columns of x
  int32_t x_blocks = 0;  // of rows of x
  int32_t groups = 0;    // clusters' worth of tiles
  int32_t up_row = 0;    // of the weight: where up's begin, if gated
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int32_t kHalves = kTileRows / kGroupRows;  // products side by side of a warp group

template <int kColumns, bool kGated>
struct TileRing {
  using S = Tile<kColumns, kGated>;
  std::byte* memory = nullptr;     // 1024-byte aligned
  PhaseBarrier* full = nullptr;    // [kStages]
  PhaseBarrier* empty = nullptr;   // [kStages] of both blocks: each brings half of x to both
  PhaseBarrier* turn = nullptr;    // [kMultiplying] to multiply: a group sees phases in their order
  PhaseBarrier* stored = nullptr;  // the staged tile is free again

  __device__ std::byte* weight(int32_t stage) const { return memory + stage * S::kStageBytes; }
  __device__ std::byte* x(int32_t stage) const { return weight(stage) + kWeightBytes; }
  __device__ std::byte* staged() const { return memory + S::kStages * S::kStageBytes; }
};

__device__ int32_t Clusters() { return static_cast<int32_t>(gridDim.x) / kCluster; }
__device__ int32_t FirstGroup() { return static_cast<int32_t>(blockIdx.x) / kCluster; }
__device__ int32_t Rank() { return static_cast<int32_t>(blockIdx.x) % kCluster; }

// A block's tile of a group.
struct Place {
  int32_t block, x_row;

  __device__ Place(const TileArgs& args, int32_t group, int32_t x_rows)
      : block(group / args.x_blocks * kCluster + Rank()), x_row(group % args.x_blocks * x_rows) {}
};

// Goes through a block's tiles, a stage's worth of columns at a time: dividing for each would take as
// long as multiplying.
template <int32_t kXRows>
struct Cursor {
  const TileArgs& args;
  int32_t group = FirstGroup(), unit = 0;
  Place place;

  __device__ explicit Cursor(const TileArgs& args) : args(args), place(args, FirstGroup(), kXRows) {}
  __device__ void Advance() {
    if (++unit < args.units) return;
    unit = 0;
    place = Place(args, group += Clusters(), kXRows);
  }
};

// One thread's: brings the tiles' rows of the weight and this block's half of those of x.
template <int kColumns, bool kGated>
__device__ void Bring(const TileRing<kColumns, kGated>& ring, const CUtensorMap& weight, const CUtensorMap& x,
                      const TileArgs& args) {
  using S = Tile<kColumns, kGated>;
  constexpr int32_t kXPart = S::kXRows / kCluster;
  Cursor<S::kXRows> at_weight(args), at_x(args);
  const auto bring_weight = [&](int32_t unit) {
    const int32_t s = unit % S::kStages;
    ring.full[s].ArriveExpecting(S::kStageBytes);
    const int32_t row = at_weight.place.block * S::kBoxRows, column = at_weight.unit * kBoxWidth;
    BringBox(ring.weight(s), weight, column, row, ring.full[s]);
    if constexpr (kGated) {
      BringBox(ring.weight(s) + S::kBoxRows * kBoxRowBytes, weight, column, args.up_row + row, ring.full[s]);
    }
    at_weight.Advance();
  };
  const auto bring_x = [&](int32_t unit) {
    const int32_t s = unit % S::kStages, first = Rank() * kXPart;
    BringBoxToAll(ring.x(s) + first * kBoxRowBytes, x, at_x.unit * kBoxWidth, at_x.place.x_row + first,
                  ring.full[s], (1 << kCluster) - 1);
    at_x.Advance();
  };
  const int32_t tiles = (args.groups - FirstGroup() + Clusters() - 1) / Clusters();
  FillRing(tiles * args.units, S::kStages, ring.empty, bring_weight, bring_x);
}

// Adds to a warp group's sums of one tile; `count` stages came before it. Both blocks that bring what it
// reads hear of an empty stage.
template <typename T, int kColumns, bool kGated>
__device__ void MultiplyTile(const TileRing<kColumns, kGated>& ring, int32_t count, int32_t units,
                             float (&sums)[kHalves][kColumns * 4]) {
  using S = Tile<kColumns, kGated>;
  const auto release = [&](int32_t unit) {
    const uint32_t thread = threadIdx.x % 128;
    if (thread < kCluster) ring.empty[(count + unit) % S::kStages].ArriveIn(thread);
  };
  for (int32_t unit = 0; unit < units; ++unit) {
    const int32_t s = (count + unit) % S::kStages;
    ring.full[s].Wait((count + unit) / S::kStages % 2);
    const uint64_t a = TileDescriptor(ring.weight(s)), b = TileDescriptor(ring.x(s));
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kBoxRowBytes / kProductBytes; ++k) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        GroupMma<T, kColumns>(sums[half], a + half * (kGroupRows * kBoxRowBytes >> 4) + k * (kProductBytes >> 4),
                              b + k * (kProductBytes >> 4));
      }
    }
    CommitProducts();
    WaitForProducts<1>();  // the unit before
    if (unit > 0) release(unit - 1);
  }
  WaitForProducts<0>();
  release(units - 1);
}

// A warp group waits for itself.
__device__ void WaitForGroup(int32_t group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Columns of y by rows: [rows of x, kStagedStride].
template <typename T, int kColumns, bool kGated>
__device__ void StageTile(std::byte* staged, const float (&sums)[kHalves][kColumns * 4]) {
  constexpr int32_t kStride = Tile<kColumns, kGated>::kStagedStride;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int32_t row = lane / 16 * 8 + lane % 8;  // of the four squares that a warp stores at a time
  const int32_t column = warp * 16 + lane / 8 % 2 * 8;
#pragma unroll
  for (int half = 0; half < (kGated ? 1 : kHalves); ++half) {
    const uint32_t to = SharedAddress(staged) + (row * kStride + half * kGroupRows + column) * 2;
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      float d[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        d[e] = sums[half][j * 4 + e];
        if constexpr (kGated) d[e] = GateUp(d[e], sums[1][j * 4 + e]);
      }
      StoreTransposed(to + j * 8 * kStride * 2, Pack2<T>(d[0], d[1]), Pack2<T>(d[2], d[3]), Pack2<T>(d[4], d[5]),
                      Pack2<T>(d[6], d[7]));
    }
  }
}

template <typename T, int kColumns, bool kGated>
__device__ void StoreTile(const std::byte* staged, const Matrix& y, const Place& place) {
  using S = Tile<kColumns, kGated>;
  constexpr int32_t kVectors = S::kYColumns / 8;
  const int32_t rows = min(kColumns * 8, y.rows - place.x_row);
  for (int32_t i = threadIdx.x % 128; i < rows * kVectors; i += 128) {
    const int32_t row = i / kVectors, vector = i % kVectors * 8, column = place.block * S::kYColumns + vector;
    if (column >= y.width) continue;
    const T* const from = reinterpret_cast<const T*>(staged) + row * S::kStagedStride + vector;
    StoreVec(y.row<T>(place.x_row + row) + column, LoadVec(from));
  }
}

template <typename T, int kColumns, bool kGated>
__device__ void MultiplyTiles(const TileRing<kColumns, kGated>& ring, const TileArgs& args) {
  const int32_t group = threadIdx.x / 128;
  const bool speaks = threadIdx.x % 128 == 0;
  for (int32_t i = group; FirstGroup() + i * Clusters() < args.groups; i += kMultiplying) {
    const Place place(args, FirstGroup() + i * Clusters(), kColumns * 8);
    float sums[kHalves][kColumns * 4] = {};
    if (i > 0) ring.turn[group].Wait((i - 1) / kMultiplying % 2);
    MultiplyTile<T>(ring, i * args.units, args.units, sums);
    if (speaks) ring.turn[kMultiplying - 1 - group].Arrive();
    if (i > 0) ring.stored->Wait((i - 1) % 2);
    StageTile<T, kColumns, kGated>(ring.staged(), sums);
    WaitForGroup(group);
    StoreTile<T, kColumns, kGated>(ring.staged(), args.y, place);
    WaitForGroup(group);
    if (speaks) ring.stored->Arrive();
  }
}

#endif

template <typename T, int kColumns, bool kGated>
__global__ void __launch_bounds__((kMultiplying + 1) * 128, 1)
    TileGemm(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x,
             const __grid_constant__ TileArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Tile<kColumns, kGated>;
  extern __shared__ __align__(1024) std::byte shared[];
  __shared__ PhaseBarrier full[S::kStages], empty[S::kStages], turn[kMultiplying], stored;
  const TileRing<kColumns, kGated> ring{shared, full, empty, turn, &stored};
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) {
    for (int32_t s = 0; s < S::kStages; ++s) full[s].Init(1), empty[s].Init(kCluster);
    for (int32_t g = 0; g < kMultiplying; ++g) turn[g].Init(1);
    stored.Init(1);
    PublishBarriers();
  }
  cluster.sync();
  if (threadIdx.x < kMultiplying * 128) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    MultiplyTiles<T>(ring, args);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == kMultiplying * 128) Bring(ring, weight, x, args);
    __syncwarp();
  }
  cluster.sync();  // the other block may still write here
#endif
}

// Eights of rows of x of a tile with which the multiprocessors are done first.
int32_t ColumnsFor(int32_t rows, int32_t blocks) {
  const int32_t clusters = Multiprocessors() / kCluster;
  int32_t best = 0, least = 0;
  for (const int32_t columns : {24, 22, 20, 18, 16}) {
    const int32_t groups = DivideUp(rows, columns * 8) * DivideUp(blocks, kCluster);
    // Of fewer than 18 the second-level cache sets the pace.
    const int32_t cost = DivideUp(groups, clusters) * std::max(columns, 18);
    if (least == 0 || cost < least) best = columns, least = cost;
  }
  return best;
}

template <typename T, int kColumns, bool kGated>
cudaError_t LaunchFor(Matrix weight, Matrix x, TileArgs args, int32_t blocks, cudaStream_t stream) {
  using S = Tile<kColumns, kGated>;
  const auto kernel = TileGemm<T, kColumns, kGated>;
  constexpr int32_t kShared = S::kStages * S::kStageBytes + S::kStagedBytes;
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (raised != cudaSuccess) return raised;
  CUtensorMap weight_map, x_map;
  cudaError_t error =
      MakeBoxMap(weight.data, x.dtype, weight.rows, x.width, weight.stride, S::kBoxRows, &weight_map);
  if (error != cudaSuccess) return error;
  error = MakeBoxMap(x.data, x.dtype, x.rows, x.width, x.stride, S::kXRows / kCluster, &x_map);
  if (error != cudaSuccess) return error;
  args.x_blocks = DivideUp(x.rows, S::kXRows);
  args.groups = args.x_blocks * DivideUp(blocks, kCluster);
  return Launch(kernel,
                {.grid = dim3(kCluster * std::min(args.groups, Multiprocessors() / kCluster)),
                 .threads = (kMultiplying + 1) * 128,
                 .shared_bytes = kShared,
                 .cluster = kCluster},
                stream, weight_map, x_map, args);
}

template <bool kGated>
cudaError_t LaunchAny(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  const int32_t blocks = DivideUp(y.width, Tile<16, kGated>::kYColumns);
  const TileArgs args{.y = y, .units = DivideUp(x.width, kBoxWidth), .up_row = kGated ? y.width : 0};
  return WithType(x.dtype, [&]<typename T>(T) {
    if constexpr (!std::is_same_v<T, float>) {
      switch (ColumnsFor(x.rows, blocks)) {
        case 24: return LaunchFor<T, 24, kGated>(weight, x, args, blocks, stream);
        case 22: return LaunchFor<T, 22, kGated>(weight, x, args, blocks, stream);
        case 20: return LaunchFor<T, 20, kGated>(weight, x, args, blocks, stream);
        case 18: return LaunchFor<T, 18, kGated>(weight, x, args, blocks, stream);
        case 16: return LaunchFor<T, 16, kGated>(weight, x, args, blocks, stream);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

// y is stored as it could be brought: by sixteen bytes.
bool CanTile(Matrix weight, Matrix x, Matrix y) {
  return y.dtype == x.dtype && y.width % 8 == 0 && CanMakeBoxMap(weight.data, x.dtype, weight.stride) &&
         CanMakeBoxMap(x.data, x.dtype, x.stride) && CanMakeBoxMap(y.data, y.dtype, y.stride);
}

bool CanTileGated(Matrix weight, Matrix x, Matrix y) { return y.width % kGroupRows == 0 && CanTile(weight, x, y); }

cudaError_t LaunchTileGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  return LaunchAny<false>(weight, x, y, stream);
}

cudaError_t LaunchGatedTileGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  return LaunchAny<true>(weight, x, y, stream);
}

}  // namespace lorikeet::cuda
