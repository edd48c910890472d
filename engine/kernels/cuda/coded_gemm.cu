#include "engine/kernels/cuda/coded_gemm.h"

#include <cuda_fp8.h>

#include <algorithm>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"

namespace lorikeet::cuda {
namespace {

namespace cg = cooperative_groups;

static_assert(kCodedBlockRows == kBlockRows && kStripWidth == kBoxWidth);

// Where a strip has column c of a row, and of what a lane takes at once. A product contracts 16
// columns, of which lane 4 g + t has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 (see Mma in vec.cuh); what it
// has of a strip's four products lies together.
constexpr int32_t kLaneBytes = 16;
__device__ constexpr int32_t PlaceOf(int32_t column) {
  const int32_t product = column / 16, within = column % 16;
  const int32_t t = within % 8 / 2, element = within / 8 * 2 + within % 2;
  return t * kLaneBytes + product * 4 + element;
}
constexpr int32_t kStripBytes = kBlockRows * kStripWidth;
constexpr float kLargestCode = 448;

__host__ __device__ constexpr int32_t Blocks(int32_t rows) {
  return (rows + kBlockRows - 1) / kBlockRows;
}

// ---- encoding

__device__ void StoreCode(const CodedPart& part, int32_t strips, int32_t row, int32_t column,
                          std::byte code) {
  std::byte* const block = part.codes + int64_t{row / kBlockRows} * strips * kStripBytes;
  block[int64_t{column / kStripWidth} * kStripBytes + row % kBlockRows * kStripWidth +
        PlaceOf(column % kStripWidth)] = code;
}

// A block a row.
template <typename T>
__global__ void EncodeRow(const T* rows, int32_t first, CodedPart part, int32_t width,
                          int32_t strips) {
  __shared__ float warp_largest[32];
  const T* const from = rows + int64_t{blockIdx.x} * width;
  float largest = 0;
  for (int32_t c = threadIdx.x; c < width; c += blockDim.x) {
    largest = fmaxf(largest, fabsf(ToFloat(from[c])));
  }
  largest = WarpReduce(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = 0;
  for (int32_t w = 0; w < static_cast<int32_t>(blockDim.x) / 32; ++w) {
    largest = fmaxf(largest, warp_largest[w]);
  }
  const float scale = largest > 0 ? largest / kLargestCode : 1;
  const int32_t row = first + static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) part.scales[row] = scale;
  for (int32_t c = threadIdx.x; c < width; c += blockDim.x) {
    const __nv_fp8_storage_t code =
        __nv_cvt_float_to_fp8(ToFloat(from[c]) / scale, __NV_SATFINITE, __NV_E4M3);
    StoreCode(part, strips, row, c, std::byte{code});
  }
}

// A block a row, of a file's blocks of a scale and kStripWidth codes each.
__global__ void StoreCodes(const std::byte* blocks, int32_t first, CodedPart part, int32_t strips) {
  constexpr int32_t kBytes = sizeof(float) + kStripWidth;
  const std::byte* const from = blocks + int64_t{blockIdx.x} * strips * kBytes;
  const int32_t row = first + static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) part.scales[row] = *reinterpret_cast<const float*>(from);
  for (int32_t c = threadIdx.x; c < strips * kStripWidth; c += blockDim.x) {
    StoreCode(part, strips, row, c,
              from[c / kStripWidth * kBytes + int32_t{sizeof(float)} + c % kStripWidth]);
  }
}

// ---- the product

struct CodedArgs {
  CodedWeight weight;
  Matrix y;
  int32_t strips = 0;
  int32_t x_blocks = 1;  // of rows of x
};

// Of at most 8 times as many rows of x two blocks have room on a multiprocessor: one begins while
// another ends.
constexpr int32_t kFewColumns = 8;

// A stage of the ring: kStrips strips of the weight, then as many boxes of x.
template <int kColumns>
struct Stage {
  static constexpr bool kFew = kColumns <= kFewColumns;
  static constexpr int32_t kStrips = kFew ? 2 : 1;
  static constexpr int32_t kBoxBytes = kColumns * 8 * kBoxRowBytes;
  static constexpr int32_t kBytes = kStrips * (kStripBytes + kBoxBytes);
  static constexpr int32_t kRoom = kFew ? 2 : 1;  // for blocks, on a multiprocessor
  static constexpr int32_t kCount = std::min(8, (kFew ? 108 << 10 : 220 << 10) / kBytes);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Four codes to the two pairs of a 16-bit type. e4m3's bits, moved to the type's exponent and
// mantissa, are the value but for the difference of the exponents' biases.
template <typename T>
__device__ void Widen(uint32_t codes, uint32_t* low, uint32_t* high) {
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  constexpr int kShift = kBf16 ? 4 : 1;
  constexpr uint32_t kMask = kBf16 ? 0x07f007f0 : 0x3f803f80;
  const auto widen = [&](uint32_t bytes) {  // codes in the upper half of each 16 bits
    const uint32_t bits = (bytes & 0x80008000) | ((bytes >> kShift) & kMask);
    uint32_t pair;
    if constexpr (kBf16) {
      constexpr uint32_t kTwoTo120 = 0x7b807b80;
      asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(bits), "r"(kTwoTo120));
    } else {
      constexpr uint32_t kTwoTo8 = 0x5c005c00;
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(bits), "r"(kTwoTo8));
    }
    return pair;
  };
  *low = widen(__byte_perm(codes, 0, 0x1404));
  *high = widen(__byte_perm(codes, 0, 0x3424));
}

template <int kColumns>
struct CodedRing {
  using S = Stage<kColumns>;
  std::byte* memory = nullptr;  // 1024-byte aligned
  PhaseBarrier* full = nullptr;
  PhaseBarrier* empty = nullptr;

  __device__ std::byte* x(int32_t stage, int32_t strip) const {
    return memory + stage * S::kBytes + strip * S::kBoxBytes;
  }
  __device__ std::byte* codes(int32_t stage, int32_t strip) const {
    return x(stage, S::kStrips) + strip * kStripBytes;
  }
};

// One thread's: brings strips [first, end) of the weight's block of rows at `codes`, and of x.
template <int kColumns>
__device__ void Bring(const CodedRing<kColumns>& ring, const std::byte* codes, const CUtensorMap& x,
                      int32_t first, int32_t end, int32_t x_row) {
  using S = Stage<kColumns>;
  const int32_t units = (end - first + S::kStrips - 1) / S::kStrips;
  const auto strips_of = [&](int32_t unit) { return min(S::kStrips, end - first - unit * S::kStrips); };
  const auto bring_codes = [&](int32_t unit) {
    const int32_t s = unit % S::kCount, strips = strips_of(unit);
    ring.full[s].ArriveExpecting(strips * (kStripBytes + S::kBoxBytes));
    BringBytes(ring.codes(s, 0), codes + int64_t{first + unit * S::kStrips} * kStripBytes,
               strips * kStripBytes, ring.full[s]);
  };
  const auto bring_x = [&](int32_t unit) {
    const int32_t s = unit % S::kCount;
    for (int32_t i = 0; i < strips_of(unit); ++i) {
      BringBox(ring.x(s, i), x, (first + unit * S::kStrips + i) * kStripWidth, x_row, ring.full[s]);
    }
  };
  FillRing(units, S::kCount, ring.empty, bring_codes, bring_x);
}

// What a lane has of a strip: its two rows' elements of four products.
template <typename T>
__device__ void Take(const std::byte* strip, uint32_t (&a)[4][4]) {
  const int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const std::byte* const from = strip + row * kStripWidth + lane % 4 * kLaneBytes;
  const uint4 low = LoadCached(from), high = LoadCached(from + 8 * kStripWidth);
  const uint32_t *lows = &low.x, *highs = &high.x;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    Widen<T>(lows[p], &a[p][0], &a[p][2]);
    Widen<T>(highs[p], &a[p][1], &a[p][3]);
  }
}

template <typename T, int kColumns>
__device__ void Multiply(const CodedRing<kColumns>& ring, int32_t strips,
                         float (&sums)[kColumns * 4]) {
  using S = Stage<kColumns>;
  for (int32_t strip = 0; strip < strips; ++strip) {
    const int32_t unit = strip / S::kStrips, s = unit % S::kCount, within = strip % S::kStrips;
    if (within == 0) ring.full[s].Wait(unit / S::kCount % 2);
    uint32_t a[4][4];
    Take<T>(ring.codes(s, within), a);
    const uint64_t b = TileDescriptor(ring.x(s, within));
    BeginProducts();
#pragma unroll
    for (int p = 0; p < 4; ++p) GroupMma<T, kColumns>(sums, a[p], b + p * (kProductBytes >> 4));
    EndProducts();
    const bool last = within == S::kStrips - 1 || strip == strips - 1;
    if (last && threadIdx.x % 128 == 0) ring.empty[s].Arrive();
  }
}

// The part that a block of rows is of, its first block, and its first column of y.
struct Place {
  int32_t part = 0, block = 0, column = 0;
};

__device__ Place PlaceOfBlock(const CodedWeight& weight, int32_t block) {
  Place place{.block = block};
  while (true) {
    const int32_t rows = weight.parts[place.part].rows;
    if (place.block < Blocks(rows)) return place;
    place.block -= Blocks(rows);
    place.column += rows;
    ++place.part;
  }
}

__device__ void WaitForComputing() {
  asm volatile("bar.sync 1, %0;" ::"n"(kComputing) : "memory");
}

#endif

// Of many rows the sums take registers that the threads which bring do without.
constexpr int32_t kManyColumns = 32;
template <int kColumns>
constexpr int32_t kThreads = kComputing + (kColumns == kManyColumns ? 128 : 32);

template <typename T, typename Y, int kColumns>
__global__ void __launch_bounds__(kThreads<kColumns>, Stage<kColumns>::kRoom)
    CodedGemm(const __grid_constant__ CUtensorMap x, const __grid_constant__ CodedArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Stage<kColumns>;
  extern __shared__ __align__(1024) std::byte shared[];
  __shared__ PhaseBarrier full[S::kCount], empty[S::kCount];
  const CodedRing<kColumns> ring{shared, full, empty};
  const cg::cluster_group cluster = cg::this_cluster();
  const int32_t blocks = static_cast<int32_t>(cluster.num_blocks());
  const int32_t rank = static_cast<int32_t>(cluster.block_rank());
  // Blocks that read the same weight are at work at the same time.
  const int32_t id = static_cast<int32_t>(blockIdx.x) / blocks;
  const Place place = PlaceOfBlock(args.weight, id / args.x_blocks);
  const CodedPart& part = args.weight.parts[place.part];
  const int32_t x_row = id % args.x_blocks * kColumns * 8;
  const int32_t begin = args.strips * rank / blocks, end = args.strips * (rank + 1) / blocks;
  const int32_t y_rows = min(kColumns * 8, args.y.rows - x_row);
  const float* const scales = part.scales + place.block * kBlockRows;
  float* const partial = reinterpret_cast<float*>(shared);
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < S::kCount; ++i) full[i].Init(1), empty[i].Init(kGroups);
    PublishBarriers();
  }
  __syncthreads();
  if (threadIdx.x < kComputing) {
    if constexpr (kColumns == kManyColumns) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    float sums[kColumns * 4] = {};
    Multiply<T>(ring, end - begin, sums);
    WaitForComputing();  // the ring, which `partial` lies in, is not read any more
    StorePartial<kColumns>(partial, sums);
    if (blocks == 1) WaitForComputing();
    else cluster.sync();
    const int32_t first = place.block * kBlockRows;
    AddOverCluster(cluster, partial, y_rows, kComputing, [&](int32_t row, int32_t column, float4 sum) {
      if (first + row >= part.rows) return;
      const float4 scale = *reinterpret_cast<const float4*>(scales + row);
      sum = {sum.x * scale.x, sum.y * scale.y, sum.z * scale.z, sum.w * scale.w};
      StoreFour(args.y.row<Y>(x_row + column) + place.column + first + row, sum);
    });
    if (blocks > 1) cluster.sync();
  } else {
    if constexpr (kColumns == kManyColumns) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    const int64_t block = int64_t{place.block} * args.strips * kStripBytes;
    if (threadIdx.x == kComputing) Bring(ring, part.codes + block, x, begin, end, x_row);
    if (blocks == 1) return;
    __syncwarp();
    cluster.sync();
    cluster.sync();
  }
#endif
}

template <typename T, typename Y, int kColumns>
cudaError_t LaunchFor(CodedArgs args, Matrix x, bool in_chains, cudaStream_t stream) {
  using S = Stage<kColumns>;
  const auto kernel = CodedGemm<T, Y, kColumns>;
  constexpr int32_t kShared = S::kCount * S::kBytes;
  static_assert(kShared >= kColumns * 8 * kPartialStride * int32_t{sizeof(float)});
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (raised != cudaSuccess) return raised;
  CUtensorMap map;
  const cudaError_t error =
      MakeBoxMap(x.data, x.dtype, x.rows, x.width, x.stride, kColumns * 8, &map);
  if (error != cudaSuccess) return error;
  int32_t blocks = 0;  // of rows of the weight
  for (int32_t p = 0; p < args.weight.count; ++p) blocks += Blocks(args.weight.parts[p].rows);
  args.x_blocks = DivideUp(x.rows, kColumns * 8);
  const int32_t cluster =
      in_chains ? 1 : ClusterFor(blocks * args.x_blocks, S::kRoom, args.strips / S::kStrips);
  return Launch(kernel,
                {.grid = dim3(cluster * blocks * args.x_blocks),
                 .threads = kThreads<kColumns>,
                 .shared_bytes = kShared,
                 .cluster = cluster},
                stream, map, args);
}

// Blocks of so many rows of x that the fewest are computed for nothing, the largest of equals.
template <typename T, typename Y>
cudaError_t LaunchTyped(const CodedArgs& args, Matrix x, bool in_chains, cudaStream_t stream) {
  if (x.rows <= 8) return LaunchFor<T, Y, 1>(args, x, in_chains, stream);
  if (x.rows <= 16) return LaunchFor<T, Y, 2>(args, x, in_chains, stream);
  if (x.rows <= 32) return LaunchFor<T, Y, 4>(args, x, in_chains, stream);
  if (x.rows <= 64) return LaunchFor<T, Y, 8>(args, x, in_chains, stream);
  if ((x.rows + 127) / 128 % 2 != 0 && x.rows <= 640) return LaunchFor<T, Y, 16>(args, x, in_chains, stream);
  return LaunchFor<T, Y, 32>(args, x, in_chains, stream);
}

}  // namespace

bool CanMultiplyCoded() { return HasHopperCode(); }

cudaError_t LaunchEncode(const void* rows, DType dtype, int32_t first, int32_t count,
                         const CodedPart& part, int32_t width, cudaStream_t stream) {
  constexpr int32_t kThreads = 256;
  const int32_t strips = DivideUp(width, kStripWidth);
  return WithType(dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) return cudaErrorInvalidValue;
    else EncodeRow<T><<<count, kThreads, 0, stream>>>(static_cast<const T*>(rows), first, part, width, strips);
    return cudaGetLastError();
  });
}

cudaError_t LaunchStoreCodes(const std::byte* blocks, int32_t first, int32_t count,
                             const CodedPart& part, int32_t width, cudaStream_t stream) {
  constexpr int32_t kThreads = 256;
  StoreCodes<<<count, kThreads, 0, stream>>>(blocks, first, part, width / kStripWidth);
  return cudaGetLastError();
}

cudaError_t LaunchCodedGemm(const CodedWeight& weight, Matrix x, Matrix y, cudaStream_t stream,
                            bool in_chains) {
  const CodedArgs args{.weight = weight, .y = y, .strips = weight.strips()};
  return WithType(x.dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) return cudaErrorInvalidValue;
    else if (y.dtype == DType::kF32) return LaunchTyped<T, float>(args, x, in_chains, stream);
    else return LaunchTyped<T, T>(args, x, in_chains, stream);
  });
}

}  // namespace lorikeet::cuda
