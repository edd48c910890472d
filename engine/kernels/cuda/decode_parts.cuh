// What the kernels for decoding rows share: which queries and pages an item has, and how what several
// warps and blocks found becomes one result.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int kDecodeWarps = 4;  // that share the pages of one chunk of one row
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
inline constexpr float kLog2E = 1.44269504f;

// For the threads that fold pages; a block may have others.
__device__ inline void SyncDecoding() {
  asm volatile("bar.sync 1, %0;" ::"n"(kDecodeThreads) : "memory");
}

// Whether it is `so` for any of them.
__device__ inline bool AnyDecoding(bool so) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, 1, %2, p; selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(so)), "n"(kDecodeThreads)
      : "memory");
  return any != 0;
}

__device__ inline uint32_t Transpose8x8(uint32_t row) {
  uint32_t column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// Over the lanes of equal lane % 4.
__device__ inline float OverTokens(float v, bool maximum) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(~0u, v, offset);
    v = maximum ? fmaxf(v, other) : v + other;
  }
  return v;
}

// Pages of an item's chunk that its row sees, both ends included; none if first > last.
struct PageRange {
  int32_t first, last;
  int32_t oldest;  // token
};

__device__ inline PageRange PagesOf(const AttentionArgs& args, const AttentionList& list,
                                    const DecodeItem& item) {
  constexpr int32_t kTokens = KvLayout::kPageTokens;
  const int32_t oldest = args.window > 0 ? max(0, item.position - args.window + 1) : 0;
  const int32_t begin = item.chunk * list.chunk_pages;
  return {max(begin, oldest / kTokens), min(begin + list.chunk_pages - 1, item.position / kTokens),
          oldest};
}

// One query's result over some tokens: [top, total, sums...].
struct Partial {
  float* at;

  __device__ float& top() const { return at[0]; }
  __device__ float& total() const { return at[1]; }
  __device__ float* sums() const { return at + 2; }
};

// Folds `count` partials, `stride` floats apart, in order. Returns sums of dimension d; *top and
// *total of all.
__device__ inline float Merge(const float* partials, int64_t stride, int32_t count, int32_t d, float* top,
                       float* total) {
  *top = -INFINITY;
  for (int32_t i = 0; i < count; ++i) *top = fmaxf(*top, __ldcg(partials + i * stride));
  float sum = 0;
  *total = 0;
  for (int32_t i = 0; i < count; ++i) {
    const float* p = partials + i * stride;
    const float weight = *top == -INFINITY ? 0.0f : exp2f(__ldcg(p) - *top);
    *total += weight * __ldcg(p + 1);
    sum += weight * __ldcg(p + 2 + d);
  }
  return sum;
}

struct HeadGroup {
  int32_t kv_head;
  int32_t first_head;
  int32_t queries;  // heads of it here: at most 8
};

__device__ inline HeadGroup GroupOf(const AttentionArgs& args, const KvLayout& layout, int32_t index) {
  const int32_t group = args.heads / layout.kv_heads;
  const int32_t tiles = DivideUp(group, 8);
  const int32_t first = index % tiles * 8;
  return {index / tiles, index / tiles * group + first, min(group - first, 8)};
}

// The block's four partials become one, written out or kept for the row's last block to merge.
template <typename T>
__device__ void FinishDecode(const AttentionArgs& args, const KvStep& step, const DecodeItem& item,
                             int32_t item_index, const HeadGroup& heads, const float* shared) {
  const int32_t dim = step.layout.head_dim, stride = dim + 2;
  const int32_t chunks = item.position / (step.list->chunk_pages * KvLayout::kPageTokens) + 1;
  T* out = args.out.row<T>(item.row);
  float top, total;
  for (int32_t i = threadIdx.x; i < heads.queries * dim; i += kDecodeThreads) {
    const int32_t query = i / dim, d = i % dim, head = heads.first_head + query;
    top = -INFINITY, total = 0;
    float sum = 0;
    for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, shared[(w * heads.queries + query) * stride]);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float* p = shared + (w * heads.queries + query) * stride;
      const float weight = top == -INFINITY ? 0.0f : exp2f(p[0] - top);
      total += weight * p[1];
      sum += weight * p[2 + d];
    }
    if (chunks == 1) {
      out[head * dim + d] = FromFloat<T>(sum / total);
      continue;
    }
    const Partial kept{step.partials + (int64_t{item_index} * args.heads + head) * stride};
    if (d == 0) kept.top() = top, kept.total() = total;
    kept.sums()[d] = sum;
  }
  if (chunks == 1) return;
  __threadfence();
  SyncDecoding();
  bool last = false;
  if (threadIdx.x == 0) {
    int32_t* arrived = step.arrived + int64_t{item.row} * args.heads + heads.first_head;
    last = atomicAdd(arrived, 1) == chunks - 1;
    if (last) *arrived = 0;
  }
  if (!AnyDecoding(last)) return;
  __threadfence();
  const int32_t first_item = item_index - item.chunk;
  for (int32_t i = threadIdx.x; i < heads.queries * dim; i += kDecodeThreads) {
    const int32_t d = i % dim, head = heads.first_head + i / dim;
    const float* partials = step.partials + (int64_t{first_item} * args.heads + head) * stride;
    const float sum = Merge(partials, int64_t{args.heads} * stride, chunks, d, &top, &total);
    out[head * dim + d] = FromFloat<T>(sum / total);
  }
}

}  // namespace lorikeet::cuda
