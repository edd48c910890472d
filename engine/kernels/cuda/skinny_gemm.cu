#include "engine/kernels/cuda/skinny_gemm.h"

#include "engine/kernels/cuda/copy_async.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kMostRows = 8;       // of x: the short side of the tensor cores' tile
constexpr int32_t kTileRows = 16;      // of the weight: the long side
constexpr int kTiles = 2;              // of a block
constexpr int32_t kRows = kTiles * kTileRows;
constexpr int32_t kChunk = 64;         // columns that a warp multiplies at a time: a line of 16 bits
constexpr int32_t kHalf = kChunk / 2;  // columns of a row that four lanes have
constexpr int kAhead = 2;              // chunks of a warp that are on their way
constexpr int kVecs = kTiles * 4;      // eights that a lane has of a chunk: of a tile two rows, of each two halves
constexpr int32_t kVecBytes = 32 * 16;  // a warp's
constexpr int32_t kChunkBytes = kVecs * kVecBytes;
constexpr int32_t kRingBytes = kAhead * kChunkBytes;  // a warp's; then its sums
constexpr int32_t kStride = kRows + 4;  // of a row's sums: lanes two rows apart find other banks
static_assert(kRingBytes >= kMostRows * kStride * int32_t{sizeof(float)});
constexpr int kWarpsOfAll = 16;  // on a multiprocessor, in one block or two

struct SkinnyArgs {
  Matrix weight, x, y;
};

// Where a lane's rows of the weight begin: of each tile rows g and g + 8, where the lane is 4 g + t; of each half
// of a chunk it has eight columns from 8 t on. Rows past the end are the last one again: nobody stores what comes
// of them.
template <typename T>
struct WeightRows {
  const T* of[kTiles][2];

  explicit __device__ WeightRows(const Matrix& weight) {
    const int32_t first = static_cast<int32_t>(blockIdx.x) * kRows + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) of[i][r] = weight.row<T>(min(first + i * kTileRows + r * 8, weight.rows - 1));
    }
  }

  // Has the lane's part of a chunk come; zeros from `width` on.
  __device__ void Bring(int32_t column, int32_t width, std::byte* chunk) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int32_t at = column + v % 2 * kHalf;
      const bool there = at < width;
      CopyLineAsync(chunk + v * kVecBytes, of[v / 4][v / 2 % 2] + (there ? at : 0), there);
    }
    CommitCopies();
  }
};

// Row g of x, past the first-level cache, which may hold what was there before.
template <typename T>
__device__ void LoadX(const Matrix& x, int32_t column, uint4 (&halves)[2]) {
  const int32_t row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t at = column + h * kHalf;
    const bool there = row < x.rows && at < x.width;
    halves[h] = there ? __ldcg(reinterpret_cast<const uint4*>(x.row<T>(row) + at)) : kZero;
  }
}

// This warp's chunks of the block's rows: every kWarps-th.
template <typename T, int kWarps>
__device__ void MultiplyChunks(const SkinnyArgs& args, std::byte* ring, float (&sums)[kTiles][4]) {
  constexpr int32_t kStep = kWarps * kChunk;
  const int32_t width = args.x.width, lane = threadIdx.x % 32, lane_column = lane % 4 * 8;
  const int32_t first = static_cast<int32_t>(threadIdx.x) / 32 * kChunk;
  const WeightRows<T> weight(args.weight);
  std::byte* const mine = ring + lane * 16;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) weight.Bring(first + lane_column + s * kStep, width, mine + s * kChunkBytes);
  WaitForKernelBefore();
  LetKernelAfterStart();
  uint4 next[2];
  LoadX<T>(args.x, first + lane_column, next);
  int32_t slot = 0;
  for (int32_t column = first; column < width; column += kStep) {
    const uint4 x[2] = {next[0], next[1]};
    LoadX<T>(args.x, column + lane_column + kStep, next);
    WaitForCopies<kAhead - 1>();
    std::byte* const chunk = mine + slot * kChunkBytes;
    uint4 w[kVecs];
#pragma unroll
    for (int v = 0; v < kVecs; ++v) w[v] = LoadCached(chunk + v * kVecBytes);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) MmaRows<T>(sums[i], w[4 * i + h], w[4 * i + 2 + h], x[h]);
    }
    weight.Bring(column + lane_column + kAhead * kStep, width, chunk);
    slot = slot + 1 == kAhead ? 0 : slot + 1;
  }
  WaitForCopies<0>();
  __syncwarp();  // the ring is not written any more
}

template <typename T, typename Y, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kWarpsOfAll / kWarps) SkinnyGemm(const SkinnyArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float sums[kTiles][4] = {};
  MultiplyChunks<T, kWarps>(args, shared + warp * kRingBytes, sums);
  const auto found = [&](int w, int32_t x_row, int32_t row) -> float& {
    return reinterpret_cast<float*>(shared + w * kRingBytes)[x_row * kStride + row];
  };
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) found(warp, 2 * t + e % 2, i * kTileRows + g + e / 2 * 8) = sums[i][e];
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kRows * args.y.rows; i += kWarps * 32) {
    const int32_t row = i % kRows, x_row = i / kRows, at = static_cast<int32_t>(blockIdx.x) * kRows + row;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += found(w, x_row, row);
    if (at < args.y.width) args.y.row<Y>(x_row)[at] = FromFloat<Y>(sum);
  }
}

template <typename T, typename Y, int kWarps>
cudaError_t LaunchOf(const SkinnyArgs& args, cudaStream_t stream) {
  const auto kernel = SkinnyGemm<T, Y, kWarps>;
  constexpr int32_t kShared = kWarps * kRingBytes;
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (raised != cudaSuccess) return raised;
  return Launch(kernel, {dim3(DivideUp(args.y.width, kRows)), kWarps * 32, kShared}, stream, args);
}

// Where one wave has all blocks, each has a multiprocessor.
template <typename T, typename Y>
cudaError_t LaunchTyped(const SkinnyArgs& args, cudaStream_t stream) {
  if (DivideUp(args.y.width, kRows) <= Multiprocessors()) return LaunchOf<T, Y, kWarpsOfAll>(args, stream);
  return LaunchOf<T, Y, kWarpsOfAll / 2>(args, stream);
}

bool IsAligned(const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0; }

}  // namespace

bool IsSkinny(Matrix weight, Matrix x, Matrix y) {
  const bool narrow = x.dtype == DType::kBF16 || x.dtype == DType::kF16;
  return narrow && x.rows <= kMostRows && DivideUp(y.width, kRows) <= 2 * Multiprocessors() && x.width % 8 == 0 &&
         IsAligned(weight) && IsAligned(x);
}

cudaError_t LaunchSkinnyGemm(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  weight.rows = y.width;
  const SkinnyArgs args{weight, x, y};
  return WithType(x.dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) return cudaErrorInvalidValue;
    else if (y.dtype == DType::kF32) return LaunchTyped<T, float>(args, stream);
    else return LaunchTyped<T, T>(args, stream);
  });
}

}  // namespace lorikeet::cuda
