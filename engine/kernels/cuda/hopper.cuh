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
  // At the barrier that block `rank` of the cluster has in the same place.
  __device__ void ArriveIn(uint32_t rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(SharedAddress(&state_)),
        "r"(rank)
        : "memory");
  }
  __device__ void ArriveExpecting(int32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(&state_)),
                 "r"(bytes)
                 : "memory");
  }
  // Before an arrival of the same phase.
  __device__ void Expect(int32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&state_)), "r"(bytes)
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

// The same to the same place in every block of the cluster that `blocks` has a bit of; the bytes arrive
// at each one's barrier.
__device__ inline void BringBoxToAll(void* shared, const CUtensorMap& map, int32_t column, int32_t row,
                                     const PhaseBarrier& barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(barrier.address()), "h"(blocks)
      : "memory");
}

// Copies `bytes`, a multiple of 16, from memory aligned to as much; they arrive at `barrier`.
__device__ inline void BringBytes(void* shared, const void* from, int32_t bytes,
                                  const PhaseBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          SharedAddress(shared)),
      "l"(from), "r"(bytes), "r"(barrier.address())
      : "memory");
}

// Where an operand begins, in 16 bytes. Of a block of a cluster an address also names the block, in bits
// that are others' in a descriptor.
__device__ inline uint64_t OperandAddress(const void* p) { return (SharedAddress(p) & 0x3ffff) >> 4; }

// A tile of rows of 128 bytes, 1024-byte aligned, 16-byte chunks exchanged as
// CU_TENSOR_MAP_SWIZZLE_128B does, as an operand whose columns are contracted.
__device__ inline uint64_t TileDescriptor(const void* tile) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return OperandAddress(tile) | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128;
}

inline constexpr int32_t kProductBytes = 32;  // that a product contracts at a time

__device__ inline void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kLeft of those committed are unfinished.
template <int kLeft>
__device__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
__device__ inline void EndProducts() {
  CommitProducts();
  WaitForProducts<0>();
}

// Stores four squares of 8 x 8 elements of 16 bits, each lane two columns' neighbours of a square's row
// (as Mma's d): columns become rows. `to`: in shared memory, a lane's is of row lane % 8 of square
// lane / 8.
__device__ inline void StoreTransposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Four squares of 8 x 8 elements; lane l gives the address of row l % 8 of square l / 8.
__device__ inline void LoadSquares(uint32_t at, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}
__device__ inline void LoadSquaresTransposed(uint32_t at, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// d[64, 8 * kColumns] += a[64, 16] b[8 * kColumns, 16]ᵀ by a warp group. d is spread as Mma's (vec.cuh):
// warp w has rows 16 w and on, d[4 j ...] the columns 8 j and on. Operands are tiles' descriptors, or
// a is in registers, spread as Mma's.
#define LK_GROUP_MMA(columns, registers, a, b, last, inputs, ...)                                   \
  if constexpr (std::is_same_v<T, BFloat16>) {                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" registers "}, " a \
                 ", " b ", 1, 1, 1, " last ";" : __VA_ARGS__ : inputs);                            \
  } else {                                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.f16.f16 {" registers "}, " a  \
                 ", " b ", 1, 1, 1, " last ";" : __VA_ARGS__ : inputs);                            \
  }
#define LK_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define LK_LIST4 "%0,%1,%2,%3"
#define LK_LIST8 LK_LIST4 ",%4,%5,%6,%7"
#define LK_LIST16 LK_TEN("") ",%10,%11,%12,%13,%14,%15"
#define LK_LIST32 LK_TEN("") "," LK_TEN("1") "," LK_TEN("2") ",%30,%31"
#define LK_LIST64 \
  LK_TEN("") "," LK_TEN("1") "," LK_TEN("2") "," LK_TEN("3") "," LK_TEN("4") "," LK_TEN("5") \
  ",%60,%61,%62,%63"
#define LK_LIST70 \
  LK_TEN("") "," LK_TEN("1") "," LK_TEN("2") "," LK_TEN("3") "," LK_TEN("4") "," LK_TEN("5") "," \
  LK_TEN("6")
#define LK_LIST72 LK_LIST70 ",%70,%71"
#define LK_LIST80 LK_LIST70 "," LK_TEN("7")
#define LK_LIST88 LK_LIST80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define LK_LIST96 LK_LIST80 "," LK_TEN("8") ",%90,%91,%92,%93,%94,%95"
#define LK_LIST128                                                                             \
  LK_TEN("") "," LK_TEN("1") "," LK_TEN("2") "," LK_TEN("3") "," LK_TEN("4") "," LK_TEN("5") "," \
  LK_TEN("6") "," LK_TEN("7") "," LK_TEN("8") "," LK_TEN("9") "," LK_TEN("10") "," LK_TEN("11")  \
  ",%120,%121,%122,%123,%124,%125,%126,%127"
#define LK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_D16(i) LK_D4(i), LK_D4(i + 4), LK_D4(i + 8), LK_D4(i + 12)
#define LK_D64(i) LK_D16(i), LK_D16(i + 16), LK_D16(i + 32), LK_D16(i + 48)

template <typename T, int kColumns>
__device__ void GroupMma(float (&d)[4 * kColumns], uint64_t a, uint64_t b) {
  static_assert(kColumns == 1 || kColumns == 2 || kColumns == 4 || kColumns == 8 ||
                kColumns == 16 || kColumns == 18 || kColumns == 20 || kColumns == 22 || kColumns == 24);
#define LK_TILES "l"(a), "l"(b)
  if constexpr (kColumns == 1) {
    LK_GROUP_MMA("8", LK_LIST4, "%4", "%5", "0, 0", LK_TILES, LK_D4(0));
  } else if constexpr (kColumns == 2) {
    LK_GROUP_MMA("16", LK_LIST8, "%8", "%9", "0, 0", LK_TILES, LK_D4(0), LK_D4(4));
  } else if constexpr (kColumns == 4) {
    LK_GROUP_MMA("32", LK_LIST16, "%16", "%17", "0, 0", LK_TILES, LK_D16(0));
  } else if constexpr (kColumns == 8) {
    LK_GROUP_MMA("64", LK_LIST32, "%32", "%33", "0, 0", LK_TILES, LK_D16(0), LK_D16(16));
  } else if constexpr (kColumns == 16) {
    LK_GROUP_MMA("128", LK_LIST64, "%64", "%65", "0, 0", LK_TILES, LK_D64(0));
  } else if constexpr (kColumns == 18) {
    LK_GROUP_MMA("144", LK_LIST72, "%72", "%73", "0, 0", LK_TILES, LK_D64(0), LK_D4(64), LK_D4(68));
  } else if constexpr (kColumns == 22) {
    LK_GROUP_MMA("176", LK_LIST88, "%88", "%89", "0, 0", LK_TILES, LK_D64(0), LK_D16(64), LK_D4(80),
                 LK_D4(84));
  } else if constexpr (kColumns == 20) {
    LK_GROUP_MMA("160", LK_LIST80, "%80", "%81", "0, 0", LK_TILES, LK_D64(0), LK_D16(64));
  } else {
    LK_GROUP_MMA("192", LK_LIST96, "%96", "%97", "0, 0", LK_TILES, LK_D64(0), LK_D16(64), LK_D16(80));
  }
#undef LK_TILES
}

template <typename T, int kColumns>
__device__ void GroupMma(float (&d)[4 * kColumns], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kColumns == 1 || kColumns == 2 || kColumns == 4 || kColumns == 8 ||
                kColumns == 16 || kColumns == 32);
#define LK_ROWS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
  if constexpr (kColumns == 1) {
    LK_GROUP_MMA("8", LK_LIST4, "{%4,%5,%6,%7}", "%8", "0", LK_ROWS, LK_D4(0));
  } else if constexpr (kColumns == 2) {
    LK_GROUP_MMA("16", LK_LIST8, "{%8,%9,%10,%11}", "%12", "0", LK_ROWS, LK_D4(0), LK_D4(4));
  } else if constexpr (kColumns == 4) {
    LK_GROUP_MMA("32", LK_LIST16, "{%16,%17,%18,%19}", "%20", "0", LK_ROWS, LK_D16(0));
  } else if constexpr (kColumns == 8) {
    LK_GROUP_MMA("64", LK_LIST32, "{%32,%33,%34,%35}", "%36", "0", LK_ROWS, LK_D16(0), LK_D16(16));
  } else if constexpr (kColumns == 16) {
    LK_GROUP_MMA("128", LK_LIST64, "{%64,%65,%66,%67}", "%68", "0", LK_ROWS, LK_D64(0));
  } else {
    LK_GROUP_MMA("256", LK_LIST128, "{%128,%129,%130,%131}", "%132", "0", LK_ROWS, LK_D64(0),
                 LK_D64(64));
  }
#undef LK_ROWS
}

#undef LK_D64
#undef LK_D16
#undef LK_D4
#undef LK_LIST128
#undef LK_LIST96
#undef LK_LIST88
#undef LK_LIST80
#undef LK_LIST72
#undef LK_LIST70
#undef LK_LIST64
#undef LK_LIST32
#undef LK_LIST16
#undef LK_LIST8
#undef LK_LIST4
#undef LK_TEN
#undef LK_GROUP_MMA

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace lorikeet::cuda
