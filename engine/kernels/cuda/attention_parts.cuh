// What attention's kernels share: which queries and pages an item has, and how what several warps and
// blocks found becomes one result.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {

inline constexpr int kDecodeWarps = 4;  // of a block that fold pages
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

// One query's result over some tokens: sums of head_dim elements, then their top and total.
struct Partial {
  float* at;

  __device__ float* sums() const { return at; }
  __device__ float& top(int32_t dim) const { return at[dim]; }
  __device__ float& total(int32_t dim) const { return at[dim + 1]; }
};

// Folds `count` partials, `stride` floats apart, in order: four sums from dimension d on, not yet over
// their total. What several chunks found is read past the first-level cache, several at a time.
struct Merged {
  float4 sum = {};
  float top = -INFINITY, total = 0;

  __device__ void Fold(const float4& more, const float2& its) {  // {top, total}
    const float new_top = fmaxf(top, its.x);
    if (new_top == -INFINITY && its.y == 0) return;  // a total that is no number stays one
    const float old_weight = exp2f(top - new_top), weight = exp2f(its.x - new_top);
    top = new_top;
    total = total * old_weight + its.y * weight;
    sum.x = sum.x * old_weight + more.x * weight;
    sum.y = sum.y * old_weight + more.y * weight;
    sum.z = sum.z * old_weight + more.z * weight;
    sum.w = sum.w * old_weight + more.w * weight;
  }
};
__device__ inline Merged MergePartials(const float* partials, int64_t stride, int32_t count, int32_t dim,
                                       int32_t d) {
  constexpr int32_t kAtOnce = 4;
  Merged merged;
  for (int32_t first = 0; first < count; first += kAtOnce) {
    float4 sums[kAtOnce];
    float2 others[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const float* const p = partials + min(first + i, count - 1) * stride;
      sums[i] = __ldcg(reinterpret_cast<const float4*>(p + d));
      others[i] = __ldcg(reinterpret_cast<const float2*>(p + dim));
    }
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      if (first + i < count) merged.Fold(sums[i], others[i]);
    }
  }
  return merged;
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

// A prompt item's queries of one KV head, packed: row by row, the group's heads of each.
struct PromptQueries {
  PromptItem item;
  int32_t kv_head;
  int32_t group;
  int32_t dim;

  __device__ int32_t count() const { return (item.row_end - item.row_begin) * group; }
  __device__ int32_t row(int32_t query) const {
    return item.row_begin + min(query, count() - 1) / group;
  }
  template <typename T>
  __device__ T* Of(const Matrix& m, int32_t query) const {
    return m.row<T>(row(query)) + int64_t{kv_head * group + query % group} * dim;
  }
};

template <typename T>
__device__ void StoreMerged(const Merged& merged, T* to) {
  const float inverse = 1 / merged.total;
  *reinterpret_cast<uint2*>(to) = {Pack2<T>(merged.sum.x * inverse, merged.sum.y * inverse),
                                   Pack2<T>(merged.sum.z * inverse, merged.sum.w * inverse)};
}

// What the warps found, [warps, queries] partials, becomes one, written out or kept for the row's last
// block to merge. Dimensions come in fours.
template <typename T>
__device__ void FinishDecode(const AttentionArgs& args, const KvStep& step, const DecodeItem& item,
                             int32_t item_index, const HeadGroup& heads, const float* shared) {
  const int32_t dim = step.layout.head_dim, stride = PartialStride(dim);
  const int32_t chunks = item.position / (step.list->chunk_pages * KvLayout::kPageTokens) + 1;
  T* const out = args.out.row<T>(item.row) + int64_t{heads.first_head} * dim;
  const int64_t of_item = int64_t{args.heads} * stride;
  float* const kept = step.partials + item_index * of_item + int64_t{heads.first_head} * stride;
  for (int32_t i = 4 * threadIdx.x; i < heads.queries * dim; i += 4 * kDecodeThreads) {
    const int32_t query = i / dim, d = i % dim;
    Merged merged;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float* const p = shared + (w * heads.queries + query) * stride;
      merged.Fold(*reinterpret_cast<const float4*>(p + d), *reinterpret_cast<const float2*>(p + dim));
    }
    if (chunks == 1) {
      StoreMerged(merged, out + i);
      continue;
    }
    float* const to = kept + query * stride;
    *reinterpret_cast<float4*>(to + d) = merged.sum;
    if (d == 0) *reinterpret_cast<float2*>(to + dim) = {merged.top, merged.total};
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
  const float* const first = kept - item.chunk * of_item;
  for (int32_t i = 4 * threadIdx.x; i < heads.queries * dim; i += 4 * kDecodeThreads) {
    StoreMerged(MergePartials(first + i / dim * stride, of_item, chunks, dim, i % dim), out + i);
  }
}

}  // namespace lorikeet::cuda
