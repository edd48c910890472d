#include "engine/kernels/cuda/stream_gemm.h"

#include <algorithm>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"

namespace lorikeet::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int32_t kWeightBytes = kBlockRows * kBoxRowBytes;  // of a stage
constexpr int32_t kMaxStages = 6;
// Two blocks have room on a multiprocessor: one begins while another ends.
constexpr int32_t kRoom = 2;
constexpr int32_t kRingBytes = 108 << 10;

struct StreamArgs {
  Matrix y;
  int32_t up_row = 0;  // gated: of the weight, U's first
  int32_t units = 0;   // stages' worth of columns
  int32_t stages = 0;  // of the ring
};

template <bool kGated>
constexpr int32_t kYColumns = kGated ? kGroupRows : kBlockRows;  // a block's

template <int kColumns>
constexpr int32_t kStageBytes = kWeightBytes + kColumns * 8 * kBoxRowBytes;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A ring of stages: kBlockRows rows of the weight, then the rows of x, of the same columns.
template <int kColumns>
struct Ring {
  std::byte* memory = nullptr;  // 1024-byte aligned
  PhaseBarrier* full = nullptr;
  PhaseBarrier* empty = nullptr;
  int32_t stages = 0;

  __device__ std::byte* weight(int32_t stage) const { return memory + stage * kStageBytes<kColumns>; }
  __device__ std::byte* x(int32_t stage) const { return weight(stage) + kWeightBytes; }
};

// One thread's: brings `units` stages from column unit `first` on, for a warp group rows `row` and on, for the
// other `other` and on.
template <int kColumns>
__device__ void Bring(const Ring<kColumns>& ring, const CUtensorMap& weight, const CUtensorMap& x,
                      int32_t first, int32_t units, int32_t row, int32_t other) {
  const auto bring_weight = [&](int32_t unit) {
    const int32_t s = unit % ring.stages, column = (first + unit) * kBoxWidth;
    ring.full[s].ArriveExpecting(kStageBytes<kColumns>);
    BringBox(ring.weight(s), weight, column, row, ring.full[s]);
    BringBox(ring.weight(s) + kWeightBytes / kGroups, weight, column, other, ring.full[s]);
  };
  const auto bring_x = [&](int32_t unit) {
    const int32_t s = unit % ring.stages;
    BringBox(ring.x(s), x, (first + unit) * kBoxWidth, 0, ring.full[s]);
  };
  FillRing(units, ring.stages, ring.empty, bring_weight, bring_x);
}

template <typename T, int kColumns>
__device__ void Multiply(const Ring<kColumns>& ring, int32_t units, float (&sums)[kColumns * 4]) {
  for (int32_t unit = 0; unit < units; ++unit) {
    const int32_t s = unit % ring.stages;
    ring.full[s].Wait(unit / ring.stages % 2);
    const std::byte* rows = ring.weight(s) + threadIdx.x / 128 * kGroupRows * kBoxRowBytes;
    const uint64_t a = TileDescriptor(rows), b = TileDescriptor(ring.x(s));
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kBoxRowBytes / kProductBytes; ++k) {
      GroupMma<T, kColumns>(sums, a + k * (kProductBytes >> 4), b + k * (kProductBytes >> 4));
    }
    EndProducts();
    if (threadIdx.x % 128 == 0) ring.empty[s].Arrive();
  }
}

#endif

template <typename Y>
__device__ void Store(const Matrix& y, int32_t row, int32_t column, float sum) {
  if (row < y.rows && column < y.width) y.row<Y>(row)[column] = FromFloat<Y>(sum);
}

template <typename Y>
__device__ void StoreAllOfFour(const Matrix& y, int32_t row, int32_t column, const float4& sum) {
  Y* const to = y.row<Y>(row) + column;
  if (column + 4 <= y.width && reinterpret_cast<uintptr_t>(to) % (4 * sizeof(Y)) == 0) {
    return StoreFour(to, sum);
  }
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int32_t i = 0; i < 4; ++i) Store<Y>(y, row, column + i, sums[i]);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The block's sums of G's rows and of U's, which lie behind them, become columns of y from `first` on.
template <typename Y>
__device__ void StoreGated(const float* partial, const Matrix& y, int32_t first) {
  constexpr int32_t kFours = kGroupRows / 4;
  for (int32_t i = threadIdx.x; i < kFours * y.rows; i += blockDim.x) {
    const int32_t column = i % kFours * 4, row = i / kFours;
    const float* const of_row = partial + row * kPartialStride + column;
    const float4 g = *reinterpret_cast<const float4*>(of_row);
    const float4 u = *reinterpret_cast<const float4*>(of_row + kGroupRows);
    StoreAllOfFour<Y>(y, row, first + column,
                      {GateUp(g.x, u.x), GateUp(g.y, u.y), GateUp(g.z, u.z), GateUp(g.w, u.w)});
  }
}

#endif

template <typename T, typename Y, int kColumns, bool kGated>
__global__ void __launch_bounds__(kComputing + 32)
    StreamGemm(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x,
               const StreamArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte shared[];
  __shared__ PhaseBarrier full[kMaxStages], empty[kMaxStages];
  const Ring<kColumns> ring{shared, full, empty, args.stages};
  const cg::cluster_group cluster = cg::this_cluster();
  const int32_t blocks = static_cast<int32_t>(cluster.num_blocks());
  const int32_t rank = static_cast<int32_t>(cluster.block_rank());
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) / blocks * kYColumns<kGated>;
  const int32_t begin = args.units * rank / blocks;
  const int32_t units = args.units * (rank + 1) / blocks - begin;
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < ring.stages; ++i) full[i].Init(1), empty[i].Init(kGroups);
    PublishBarriers();
  }
  __syncthreads();
  float sums[kColumns * 4] = {};
  if (threadIdx.x < kComputing) {
    Multiply<T>(ring, units, sums);
  } else if (threadIdx.x == kComputing) {
    Bring(ring, weight, x, begin, units, first_row, first_row + (kGated ? args.up_row : kGroupRows));
  }
  float* const partial = reinterpret_cast<float*>(shared);
  if (kGated || blocks > 1) {
    __syncthreads();  // the ring is not read any more
    if (threadIdx.x < kComputing) StorePartial<kColumns>(partial, sums);
  }
  if constexpr (kGated) {
    __syncthreads();
    StoreGated<Y>(partial, args.y, first_row);
  } else if (blocks > 1) {
    cluster.sync();
    AddOverCluster(cluster, partial, args.y.rows, blockDim.x, [&](int32_t row, int32_t column, float4 sum) {
      StoreAllOfFour<Y>(args.y, column, first_row + row, sum);
    });
    cluster.sync();
  } else if (threadIdx.x < kComputing) {
    ForEachSum<kColumns>(sums, [&](int32_t row, int32_t column, float sum) {
      Store<Y>(args.y, column, first_row + row, sum);
    });
  }
#endif
}

template <typename T, typename Y, int kColumns, bool kGated>
cudaError_t LaunchFor(Matrix weight, Matrix x, Matrix y, bool in_chains, cudaStream_t stream) {
  const auto kernel = StreamGemm<T, Y, kColumns, kGated>;
  constexpr int32_t kStages = std::min(kMaxStages, kRingBytes / kStageBytes<kColumns>);
  constexpr int32_t kShared = kStages * kStageBytes<kColumns>;
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (raised != cudaSuccess) return raised;
  CUtensorMap weight_map, x_map;
  const int32_t weight_rows = kGated ? 2 * y.width : y.width;
  cudaError_t error = MakeBoxMap(weight.data, x.dtype, weight_rows, x.width, weight.stride, kGroupRows, &weight_map);
  if (error != cudaSuccess) return error;
  error = MakeBoxMap(x.data, x.dtype, x.rows, x.width, x.stride, kColumns * 8, &x_map);
  if (error != cudaSuccess) return error;
  const int32_t row_blocks = DivideUp(y.width, kYColumns<kGated>);
  const StreamArgs args{.y = y, .up_row = y.width, .units = DivideUp(x.width, kBoxWidth), .stages = kStages};
  const int32_t cluster = kGated || in_chains ? 1 : ClusterFor(row_blocks, kRoom, args.units);
  return Launch(kernel,
                {.grid = dim3(cluster * row_blocks),
                 .threads = kComputing + 32,
                 .shared_bytes = kShared,
                 .cluster = cluster},
                stream, weight_map, x_map, args);
}

template <typename T, typename Y, bool kGated>
cudaError_t LaunchTyped(Matrix weight, Matrix x, Matrix y, bool in_chains, cudaStream_t stream) {
  if (x.rows <= 8) return LaunchFor<T, Y, 1, kGated>(weight, x, y, in_chains, stream);
  if (x.rows <= 16) return LaunchFor<T, Y, 2, kGated>(weight, x, y, in_chains, stream);
  if (x.rows <= 32) return LaunchFor<T, Y, 4, kGated>(weight, x, y, in_chains, stream);
  static_assert(kMaxStreamedRows <= 64);
  return LaunchFor<T, Y, 8, kGated>(weight, x, y, in_chains, stream);
}

}  // namespace

bool CanStream(Matrix weight, Matrix x) {
  return x.rows <= kMaxStreamedRows && CanMakeBoxMap(weight.data, x.dtype, weight.stride) &&
         CanMakeBoxMap(x.data, x.dtype, x.stride);
}

cudaError_t LaunchStreamGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, bool in_chains) {
  return WithType(x.dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) return cudaErrorInvalidValue;
    else if (y.dtype == DType::kF32) return LaunchTyped<T, float, false>(weight, x, y, in_chains, stream);
    else return LaunchTyped<T, T, false>(weight, x, y, in_chains, stream);
  });
}

cudaError_t LaunchGatedStreamGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  return WithType(x.dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) return cudaErrorInvalidValue;
    else return LaunchTyped<T, T, true>(weight, x, y, /*in_chains=*/true, stream);
  });
}

}  // namespace lorikeet::cuda
