// A page of keys and values as the copy engine brings it, and the running softmax (Dao et al. 2022) of a
// warp that folds one after another.
#pragma once

#include "engine/kernels/cuda/attention_parts.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"

namespace lorikeet::cuda {

inline constexpr int32_t kBoxBytes = KvLayout::kPageTokens * kBoxRowBytes;  // 64 dimensions of the tokens

// A head's keys in kBoxes boxes, then its values.
template <int kDim>
struct Page {
  static constexpr int kBoxes = kDim / kBoxWidth;
  static constexpr int kBytes = 2 * kBoxes * kBoxBytes;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What lies between the copy engine and the warps that fold. `count`: pages so far, of either side.
template <int kDim, int kStages>
struct PageRing {
  std::byte* memory = nullptr;  // 1024-byte aligned
  PhaseBarrier* full = nullptr;
  PhaseBarrier* empty = nullptr;
  int32_t count = 0;

  __device__ int32_t stage() const { return count % kStages; }
  __device__ std::byte* page() const { return memory + stage() * Page<kDim>::kBytes; }
  __device__ void WaitUntilFull() const { full[stage()].Wait(count / kStages % 2); }

  // One thread's: the next page, whose keys and values begin at these rows of the map.
  __device__ void Bring(const CUtensorMap& map, int32_t keys, int32_t values) {
    empty[stage()].Wait(count / kStages % 2 ^ 1);
    full[stage()].ArriveExpecting(Page<kDim>::kBytes);
    constexpr int kBoxes = Page<kDim>::kBoxes;
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      BringBox(page() + i * kBoxBytes, map, i * kBoxWidth, keys, full[stage()]);
      BringBox(page() + (kBoxes + i) * kBoxBytes, map, i * kBoxWidth, values, full[stage()]);
    }
    ++count;
  }
  // A warp's: it is done with the page.
  __device__ void Release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty[stage()].Arrive();
    ++count;
  }
};

// Where a head's keys and values begin in pages, as rows of the map.
template <int kDim>
struct MapRows {
  __device__ MapRows(const KvLayout& layout, int32_t layer, int32_t kv_head)
      : of_page(static_cast<int32_t>(layout.page_bytes() / (kDim * 2))),
        keys(static_cast<int32_t>(layout.Offset(layer, false, kv_head) / (kDim * 2))),
        values(keys + layout.kv_heads * KvLayout::kPageTokens) {}

  int32_t of_page, keys, values;
};

// A warp's: calls bring(page's id, block) for the blocks [first, last] of a sequence in turn, and looked_up()
// before, with ids at hand.
template <typename LookedUp, typename Bring>
__device__ void ForEachPage(const int32_t* ids, int32_t pages_per_block, int32_t first, int32_t last,
                            const LookedUp& looked_up, const Bring& bring) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t from = first; from <= last; from += 32) {
    const int32_t mine = ids[min(from + lane, last) * pages_per_block];
    looked_up();
    for (int32_t i = 0; i < 32 && from + i <= last; ++i) {
      bring(__shfl_sync(~0u, mine, i), from + i);
      __syncwarp();
    }
  }
}

__device__ inline float Exp2(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// Running softmax of one warp over kGroups times eight queries. Of each group lane 4 g + t holds queries
// 2t and 2t + 1 of tops, totals (of its tokens) and sums, and query g of the operand.
template <typename T, int kDim, int kGroups>
class Folding {
 public:
  // row_of(query): nullptr if there is none.
  template <typename RowOf>
  __device__ explicit Folding(const RowOf& row_of) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const T* const row = row_of(8 * n + g);
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const T* const from = row + 16 * k + 8 * half + 2 * t;
          q_[n][k][half] = row == nullptr ? 0 : __ldcg(reinterpret_cast<const uint32_t*>(from));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) top_[n][i] = -INFINITY;
    }
  }

  // scale includes log2 e; visible(n, i, token): whether query 8 n + 2 t + i sees the page's token, asked
  // where not all see all.
  template <typename Visible>
  __device__ void Fold(const std::byte* page, float scale, bool all, const Visible& visible) {
    float scores[kGroups][4];
    MultiplyKeys(SharedAddress(page), scores);
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] *= scale;
        if (!all && !visible(n, i % 2, g + i / 2 * 8)) scores[n][i] = -INFINITY;
      }
    }
    RaiseTops(scores);
    uint32_t weights[kGroups][2];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float top = top_[n][i % 2];
        scores[n][i] = Exp2(scores[n][i] - (top == -INFINITY ? 0.0f : top));  // nothing visible yet
        total_[n][i % 2] += scores[n][i];
      }
      weights[n][0] = Transpose8x8(Pack2<T>(scores[n][0], scores[n][1]));
      weights[n][1] = Transpose8x8(Pack2<T>(scores[n][2], scores[n][3]));
    }
    AddValues(SharedAddress(page) + Page<kDim>::kBoxes * kBoxBytes, weights);
  }

  // The first group's `queries`, to partials of shared memory.
  __device__ void StorePartials(int32_t queries, float* shared) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = OverTokens(total_[0][i], false);
      if (2 * t + i >= queries) continue;
      const Partial out{shared + (2 * t + i) * PartialStride(kDim)};
      if (g == 0) out.top(kDim) = top_[0][i], out.total(kDim) = total;
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
        out.sums()[16 * j + g] = sums_[0][j][i];
        out.sums()[16 * j + g + 8] = sums_[0][j][i + 2];
      }
    }
  }
  // Results; row_of(query): nullptr if there is none.
  template <typename RowOf>
  __device__ void Store(const RowOf& row_of) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float inverse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) inverse[i] = 1 / OverTokens(total_[n][i], false);
      T* const row = row_of(8 * n + g);
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Dimension 16 j + 8 half + g of two queries becomes two dimensions of query g.
          const uint32_t pair = Transpose8x8(Pack2<T>(sums_[n][j][2 * half] * inverse[0],
                                                      sums_[n][j][2 * half + 1] * inverse[1]));
          if (row != nullptr) *reinterpret_cast<uint32_t*>(row + 16 * j + 8 * half + 2 * t) = pair;
        }
      }
    }
  }

 private:
  // Rows lie 128 bytes apart, their 16-byte chunks exchanged by the row's last three bits. Calls
  // fn(i, squares) for the dimensions 16 i and on; `at`: of the lane's row at the first of them.
  template <auto kLoad, typename Fn>
  static __device__ void ForEachSquares(uint32_t at, const Fn& fn) {
    constexpr int kAtOnce = 4;  // loads on their way
#pragma unroll
    for (int first = 0; first < kDim / 16; first += kAtOnce) {
      uint32_t squares[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) kLoad((at + (first + i) / 4 * kBoxBytes) ^ ((first + i) % 4 << 5), squares[i]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) fn(first + i, squares[i]);
    }
  }

  __device__ void MultiplyKeys(uint32_t keys, float (&scores)[kGroups][4]) const {
    const uint32_t r = threadIdx.x % 8, square = threadIdx.x % 32 / 8;
    const uint32_t at = keys + (r + square % 2 * 8) * kBoxRowBytes + ((square / 2 ^ r) << 4);
    float sums[kGroups][2][4] = {};  // two chains of products each
    ForEachSquares<LoadSquares>(at, [&](int k, const uint32_t(&a)[4]) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        Mma<T>(sums[n][k % 2], a[0], a[1], a[2], a[3], q_[n][k][0], q_[n][k][1]);
      }
    });
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = sums[n][0][i] + sums[n][1][i];
    }
  }

  // What was summed shrinks only once a score is kSlack above its query's top: weights may reach
  // 2^kSlack, which every type holds.
  __device__ void RaiseTops(const float (&scores)[kGroups][4]) {
    constexpr float kSlack = 8;
    bool higher = false;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) higher |= scores[n][i] > top_[n][i % 2] + kSlack;
    }
    if (!__any_sync(~0u, higher)) return;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Each query by its own scores alone: its weights are rounded the same whoever is beside it.
        const float highest = OverTokens(fmaxf(scores[n][i], scores[n][i + 2]), true);
        const float top = highest > top_[n][i] + kSlack ? highest : top_[n][i];
        const float shrink = top == -INFINITY ? 0.0f : Exp2(top_[n][i] - top);
        top_[n][i] = top;
        total_[n][i] *= shrink;
#pragma unroll
        for (int j = 0; j < kDim / 16; ++j) sums_[n][j][i] *= shrink, sums_[n][j][i + 2] *= shrink;
      }
    }
  }

  __device__ void AddValues(uint32_t values, const uint32_t (&weights)[kGroups][2]) {
    const uint32_t r = threadIdx.x % 8, square = threadIdx.x % 32 / 8;
    const uint32_t at = values + (r + square / 2 * 8) * kBoxRowBytes + ((square % 2 ^ r) << 4);
    ForEachSquares<LoadSquaresTransposed>(at, [&](int j, const uint32_t(&a)[4]) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        Mma<T>(sums_[n][j], a[0], a[1], a[2], a[3], weights[n][0], weights[n][1]);
      }
    });
  }

  uint32_t q_[kGroups][kDim / 16][2];
  float top_[kGroups][2];  // log2 units
  float total_[kGroups][2] = {};
  float sums_[kGroups][kDim / 16][4] = {};  // [j]: dimensions 16 j + g and 8 more
};

// Tokens from `tokens` on are another request's leftovers: zeros stand for their values.
template <int kDim>
__device__ void ClearValues(std::byte* page, int32_t tokens) {
  constexpr int kChunks = kBoxRowBytes / 16;
  for (int box = Page<kDim>::kBoxes; box < 2 * Page<kDim>::kBoxes; ++box) {
    uint4* const chunks = reinterpret_cast<uint4*>(page + box * kBoxBytes);
    for (int i = tokens * kChunks + threadIdx.x % 32; i < KvLayout::kPageTokens * kChunks; i += 32) chunks[i] = kZero;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine writes here next
  __syncwarp();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace lorikeet::cuda
