// 16-byte vectors of elements, conversions and the tensor-core product: what the kernels of this
// folder share. Elements are float, __half or __nv_bfloat16; the tensor cores take the latter two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "engine/base/dtype.h"

namespace lorikeet::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Calls fn with a value of the type that `dtype` names: one switch an operation.
template <typename Fn>
auto WithType(DType dtype, const Fn& fn) {
  if (dtype == DType::kBF16) return fn(BFloat16());
  if (dtype == DType::kF16) return fn(Half());
  return fn(float());
}

__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(Half v) { return __half2float(v); }
__device__ inline float ToFloat(BFloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T FromFloat(float v) {
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, Half>) return __float2half_rn(v);
  else return v;
}

// Eight elements: 16 bytes of the 16-bit types, 32 of float.
template <typename T>
struct alignas(16) Vec8 {
  T v[8];
};

template <typename T>
__device__ Vec8<T> LoadVec(const T* p) {
  return *reinterpret_cast<const Vec8<T>*>(p);
}

template <typename T>
__device__ void StoreVec(T* p, const Vec8<T>& vec) {
  *reinterpret_cast<Vec8<T>*>(p) = vec;
}

// Read once: past the first-level cache.
__device__ inline uint4 LoadStreaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// silu(gate) · up (Shazeer 2020, SwiGLU).
__device__ inline float GateUp(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

inline constexpr uint4 kZero = {0, 0, 0, 0};

__device__ inline uint4 LoadCached(const void* p) { return *static_cast<const uint4*>(p); }

template <typename T>
__device__ uint32_t Pack2(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <typename T>
__device__ float2 Unpack2(uint32_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
}

// d += a b on the tensor cores. Lane = 4 g + t holds, of a [16, 16]: (g, 2t..), (g + 8, 2t..),
// (g, 2t + 8..), (g + 8, 2t + 8..), two elements each; of b [16, 8]: (2t.., g), (2t + 8.., g); of
// d [16, 8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) (PTX ISA, mma.m16n8k16).
template <typename T>
__device__ void Mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Sixteen bytes along the contracted dimension are two products' worth: with the same choice of
// elements on both sides their order does not matter. a: rows g and g + 8; b: column g.
template <typename T>
__device__ void MmaRows(float (&d)[4], const uint4& a_low, const uint4& a_high, const uint4& b) {
  Mma<T>(d, a_low.x, a_high.x, a_low.y, a_high.y, b.x, b.y);
  Mma<T>(d, a_low.z, a_high.z, a_low.w, a_high.w, b.z, b.w);
}

// Element j of eight of two vectors as one register: {x[j], y[j]}.
__device__ inline uint32_t PairElement(const uint4& x, const uint4& y, int j) {
  const uint32_t* xs = &x.x;
  const uint32_t* ys = &y.x;
  return __byte_perm(xs[j / 2], ys[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
}

template <typename Fn>
__device__ float WarpReduce(float v, const Fn& fn) {
  for (int offset = 16; offset > 0; offset /= 2) v = fn(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

__device__ inline float WarpSum(float v) {
  return WarpReduce(v, [](float a, float b) { return a + b; });
}

// a · b, a warp's; width: a multiple of 8.
template <typename T>
__device__ float WarpDot(const T* a, const T* b, int32_t width) {
  float sum = 0;
  for (int32_t c = threadIdx.x % 32 * 8; c < width; c += 32 * 8) {
    const Vec8<T> left = LoadVec(a + c), right = LoadVec(b + c);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += ToFloat(left.v[j]) * ToFloat(right.v[j]);
  }
  return WarpSum(sum);
}

// Programmatic dependent launch: what stands before the wait may run while the kernel before is
// still at work, so it reads nothing that another kernel of the step writes.
__device__ inline void WaitForKernelBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void LetKernelAfterStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace lorikeet::cuda
