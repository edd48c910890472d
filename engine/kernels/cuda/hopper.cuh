// What only compute capability 9.0 has (target sm_90a): bulk tensor copies into shared memory,
// barriers that count their bytes, and products of a warp group whose operands lie in shared
// memory. On other targets nothing of it is compiled. PTX ISA: mbarrier, cp.async.bulk.tensor,
// wgmma.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A barrier in shared memory. Each phase ends when `arrivals` have arrived and the bytes they
// expect have come; phase p has parity p % 2.
class PhaseBarrier {
 public:
  __device__ void Init(int32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(&state_)), "r"(arrivals));
  }
  __device__ void Arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(SharedAddress(&state_)) : "memory");
  }
  __device__ void ArriveExpecting(int32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(&state_)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ void Wait(int32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(SharedAddress(&state_)), "r"(parity)
          : "memory");
    }
  }
  __device__ uint32_t address() const { return SharedAddress(&state_); }

 private:
  uint64_t state_;
};

// Barriers that were initialised are seen by the copy engine.
__device__ inline void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Copies the map's box at (column, row) to shared memory; its bytes arrive at `barrier`.
__device__ inline void BringBox(void* shared, const CUtensorMap& map, int32_t column, int32_t row,
                                const PhaseBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(barrier.address())
      : "memory");
}

// A tile of rows of 128 bytes, 1024-byte aligned, 16-byte chunks exchanged as
// CU_TENSOR_MAP_SWIZZLE_128B does, as an operand whose columns are contracted.
__device__ inline uint64_t TileDescriptor(const void* tile) {
  const uint64_t address = SharedAddress(tile) >> 4;
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return address | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128;
}

inline constexpr int32_t kProductBytes = 32;  // that a product contracts at a time

__device__ inline void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void EndProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d[64, 8 * kColumns] += a[64, 16] b[8 * kColumns, 16]ᵀ by a warp group. d is spread as Mma's (vec.cuh):
// warp w has rows 16 w and on, d[4 j ...] the columns 8 j and on.
template <typename T, int kColumns>
__device__ void GroupMma(float (&d)[4 * kColumns], uint64_t a, uint64_t b) {
  static_assert(kColumns == 1 || kColumns == 2 || kColumns == 4);
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
#define LK_GROUP_MMA(columns, types, registers, ina, inb, ...)                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." types " {" registers   \
               "}, " ina ", " inb ", 1, 1, 1, 0, 0;"                                         \
               : __VA_ARGS__                                                                 \
               : "l"(a), "l"(b))
#define LK_BOTH(columns, registers, ina, inb, ...)                                           \
  if constexpr (kBf16) LK_GROUP_MMA(columns, "bf16.bf16", registers, ina, inb, __VA_ARGS__); \
  else LK_GROUP_MMA(columns, "f16.f16", registers, ina, inb, __VA_ARGS__)
#define LK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
  if constexpr (kColumns == 1) {
    LK_BOTH("8", "%0,%1,%2,%3", "%4", "%5", LK_D4(0));
  } else if constexpr (kColumns == 2) {
    LK_BOTH("16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", LK_D4(0), LK_D4(4));
  } else {
    LK_BOTH("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16", "%17", LK_D4(0),
            LK_D4(4), LK_D4(8), LK_D4(12));
  }
#undef LK_D4
#undef LK_BOTH
#undef LK_GROUP_MMA
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace lorikeet::cuda
