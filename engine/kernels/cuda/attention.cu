#include "engine/kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int32_t kPageTokens = KvLayout::kPageTokens;
constexpr float kLog2E = 1.44269504f;
constexpr uint4 kZero = {0, 0, 0, 0};
static_assert(kPageTokens == 16, "a page is one side of the tensor cores' tile");

// K block of a head in a page; V lies kv_heads blocks behind.
__device__ const std::byte* KeyBlockIn(const KvStep& step, int32_t page, int32_t layer,
                                       int32_t kv_head) {
  return step.pages + page * step.layout.page_bytes() + step.layout.Offset(layer, false, kv_head);
}

__device__ const std::byte* KeyBlock(const KvStep& step, int32_t sequence, int32_t block,
                                     int32_t layer, int32_t kv_head) {
  const int32_t page = step.list->page_ids[step.list->page_begin[sequence] +
                                           block * step.layout.pages_per_block +
                                           step.layout.PageOfLayer(layer)];
  return KeyBlockIn(step, page, layer, kv_head);
}

__device__ uint32_t Transpose8x8(uint32_t row) {
  uint32_t column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// Running softmax of one warp over kQueries · 8 queries. Lane 4 g + t holds, of each group of
// eight, queries 2t and 2t + 1 (sums, top, total) and query g (operand q).
template <int kDim, int kQueries>
struct Attending {
  uint4 q[kQueries][kDim / 32];            // query g: elements 32 i + 8 t ..
  float top[kQueries][2];                  // log2 units
  float total[kQueries][2];                // of this lane's tokens
  float sums[kQueries][kDim / 64][4][4];   // [64-block][j]: dims 8 g + 2 j, + 1 of queries 2t, 2t + 1

  __device__ void Clear() {
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) top[n][i] = -INFINITY, total[n][i] = 0;
#pragma unroll
      for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][b][j][i] = 0;
        }
      }
    }
  }
};

template <int kDim>
struct PageKeys {
  uint4 k[kDim / 32][2];  // tokens g and g + 8, dims 32 i + 8 t ..
};
template <int kDim>
struct PageValues {
  uint4 v[kDim / 64][4];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9, dims 8 g of each 64-block
};

// One head's block of a page. Tokens from `tokens` on are another request's leftovers: they are not
// read. kOnce: nobody else reads them.
template <typename T, bool kOnce>
struct Page {
  const T* keys;
  const T* values;
  int32_t tokens;
  int32_t dim;

  __device__ Page(const KvStep& step, const std::byte* block, int32_t tokens)
      : keys(reinterpret_cast<const T*>(block)),
        values(keys + int64_t{step.layout.kv_heads} * kPageTokens * step.layout.head_dim),
        tokens(tokens),
        dim(step.layout.head_dim) {}

  __device__ uint4 At(const T* from, int token, int d) const {
    if (token >= tokens || d >= dim) return kZero;
    return kOnce ? LoadStreaming(from + token * dim + d) : LoadCached(from + token * dim + d);
  }
  template <int kDim>
  __device__ void Load(PageKeys<kDim>* to) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      to->k[i][0] = At(keys, g, 32 * i + 8 * t);
      to->k[i][1] = At(keys, g + 8, 32 * i + 8 * t);
    }
  }
  template <int kDim>
  __device__ void Load(PageValues<kDim>* to) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to->v[b][i] = At(values, 2 * t + i % 2 + i / 2 * 8, 64 * b + 8 * g);
    }
  }
};

__device__ inline float OverTokens(float v, bool maximum) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(~0u, v, offset);
    v = maximum ? fmaxf(v, other) : v + other;
  }
  return v;
}

template <int kQueries>
using Scores = float[kQueries][4];  // of each group: token g and g + 8 of queries 2t, 2t + 1

template <typename T, int kDim, int kQueries>
__device__ void MultiplyKeys(const PageKeys<kDim>& page, const Attending<kDim, kQueries>& state,
                             Scores<kQueries>& scores) {
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      MmaRows<T>(scores[n], page.k[i][0], page.k[i][1], state.q[n][i]);
    }
  }
}

// Folds a page into the running softmax. visible(n, i, token): whether query 2t + i of group n sees
// it. scale includes log2 e.
template <typename T, int kDim, int kQueries, typename Visible>
__device__ void FoldValues(const PageValues<kDim>& page, Scores<kQueries>& all, float scale,
                           const Visible& visible, Attending<kDim, kQueries>* state) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
    float(&scores)[4] = all[n];
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = scores[i + 2 * half];
        score = visible(n, i, g + 8 * half) ? score * scale : -INFINITY;
      }
      const float page_top = OverTokens(fmaxf(scores[i], scores[i + 2]), true);
      const float top = fmaxf(state->top[n][i], page_top);
      const float base = top == -INFINITY ? 0.0f : top;  // nothing visible yet
      shrink[i] = exp2f(state->top[n][i] - base);
      scores[i] = exp2f(scores[i] - base);
      scores[i + 2] = exp2f(scores[i + 2] - base);
      state->top[n][i] = top;
      state->total[n][i] = state->total[n][i] * shrink[i] + scores[i] + scores[i + 2];
    }
    const uint32_t low = Transpose8x8(Pack2<T>(scores[0], scores[1]));
    const uint32_t high = Transpose8x8(Pack2<T>(scores[2], scores[3]));
#pragma unroll
    for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float(&sums)[4] = state->sums[n][b][j];
        sums[0] *= shrink[0], sums[1] *= shrink[1], sums[2] *= shrink[0], sums[3] *= shrink[1];
        Mma<T>(sums, PairElement(page.v[b][0], page.v[b][1], 2 * j),
               PairElement(page.v[b][0], page.v[b][1], 2 * j + 1),
               PairElement(page.v[b][2], page.v[b][3], 2 * j),
               PairElement(page.v[b][2], page.v[b][3], 2 * j + 1), low, high);
      }
    }
  }
}

// Query g of group n from a row of q; nullptr: none.
template <typename T, int kDim, int kQueries>
__device__ void LoadQuery(const T* row, int32_t dim, int n, Attending<kDim, kQueries>* state) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const int d = 32 * i + 8 * t;
    state->q[n][i] = row != nullptr && d < dim ? LoadCached(row + d) : kZero;
  }
}

// ---- decoding: the warps of a block share the pages of one chunk of one row

// One query's result over some tokens: [top, total, sums...].
struct Partial {
  float* at;

  __device__ float& top() const { return at[0]; }
  __device__ float& total() const { return at[1]; }
  __device__ float* sums() const { return at + 2; }
};

template <int kDim>
__device__ void StoreWarp(const Attending<kDim, 1>& state, int32_t queries, int32_t dim,
                          float* shared) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = OverTokens(state.total[0][i], false);
    const int query = 2 * t + i;
    if (query >= queries) continue;
    const Partial out{shared + (warp * queries + query) * (dim + 2)};
    if (g == 0) out.top() = state.top[0][i], out.total() = total;
#pragma unroll
    for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int d = 64 * b + 8 * g + 2 * j;
        if (d >= dim) continue;
        out.sums()[d] = state.sums[0][b][j][i];
        out.sums()[d + 1] = state.sums[0][b][j][i + 2];
      }
    }
  }
}

// Folds `count` partials, `stride` floats apart, in order. Returns sums of dimension d; *top and
// *total of all.
__device__ float Merge(const float* partials, int64_t stride, int32_t count, int32_t d, float* top,
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

__device__ HeadGroup GroupOf(const AttentionArgs& args, const KvLayout& layout, int32_t index) {
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
  const int32_t chunks = item.position / (step.list->chunk_pages * kPageTokens) + 1;
  T* out = args.out.row<T>(item.row);
  float top, total;
  for (int32_t i = threadIdx.x; i < heads.queries * dim; i += kThreads) {
    const int32_t query = i / dim, d = i % dim, head = heads.first_head + query;
    top = -INFINITY, total = 0;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared[(w * heads.queries + query) * stride]);
    for (int w = 0; w < kWarps; ++w) {
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
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* arrived = step.arrived + int64_t{item.row} * args.heads + heads.first_head;
    last = atomicAdd(arrived, 1) == chunks - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int32_t first_item = item_index - item.chunk;
  for (int32_t i = threadIdx.x; i < heads.queries * dim; i += kThreads) {
    const int32_t d = i % dim, head = heads.first_head + i / dim;
    const float* partials = step.partials + (int64_t{first_item} * args.heads + head) * stride;
    const float sum = Merge(partials, int64_t{args.heads} * stride, chunks, d, &top, &total);
    out[head * dim + d] = FromFloat<T>(sum / total);
  }
}

// The pages of a chunk that this warp folds, every kWarps-th. The next page's keys are on their way
// while this one's values are folded, its values while keys are multiplied, and the page after it
// is being looked up.
template <typename T, int kDim>
__device__ void FoldChunk(const AttentionArgs& args, const KvStep& step, const DecodeItem& item,
                          int32_t kv_head, Attending<kDim, 1>* state) {
  const int32_t position = item.position;
  const int32_t oldest = args.window > 0 ? max(0, position - args.window + 1) : 0;
  const int32_t begin = item.chunk * step.list->chunk_pages;
  const int32_t first = max(begin, oldest / kPageTokens) + threadIdx.x / 32;
  const int32_t last = min(begin + step.list->chunk_pages - 1, position / kPageTokens);
  if (first > last) return;
  const int32_t* ids = step.list->page_ids + item.page_begin + step.layout.PageOfLayer(args.layer);
  const auto id_of = [&](int32_t block) {
    return ids[min(block, last) * step.layout.pages_per_block];
  };
  const auto page_at = [&](int32_t block, int32_t id) {
    return Page<T, true>(step, KeyBlockIn(step, id, args.layer, kv_head),
                         position - block * kPageTokens + 1);
  };
  PageKeys<kDim> keys;
  PageValues<kDim> values;
  int32_t next_id = id_of(first + kWarps);
  const Page<T, true> first_page = page_at(first, id_of(first));
  first_page.Load(&keys);
  first_page.Load(&values);
  for (int32_t block = first; block <= last; block += kWarps) {
    const bool more = block + kWarps <= last;
    const Page<T, true> next = page_at(block + kWarps, next_id);
    next_id = id_of(block + 2 * kWarps);
    const auto visible = [&](int, int, int token) {
      const int32_t at = block * kPageTokens + token;
      return at <= position && at >= oldest;
    };
    Scores<1> scores;
    MultiplyKeys<T, kDim, 1>(keys, *state, scores);
    if (more) next.Load(&keys);
    FoldValues<T, kDim, 1>(values, scores, args.scale * kLog2E, visible, state);
    if (more) next.Load(&values);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 4 : kDim <= 128 ? 3 : 1) Decode(const AttentionArgs args, const KvStep step) {
  extern __shared__ float shared[];  // [warps, queries, head_dim + 2]
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int g = threadIdx.x % 32 / 4;
  const int32_t dim = step.layout.head_dim;
  const HeadGroup heads = GroupOf(args, step.layout, blockIdx.y);
  const int32_t items = step.list->decode_count;
  for (int32_t index = blockIdx.x; index < items; index += gridDim.x) {
    const DecodeItem item = step.list->decodes[index];
    Attending<kDim, 1> state;
    state.Clear();
    const T* q = args.q.row<T>(item.row) + int64_t{heads.first_head + g} * dim;
    LoadQuery(g < heads.queries ? q : nullptr, dim, 0, &state);
    FoldChunk<T, kDim>(args, step, item, heads.kv_head, &state);
    StoreWarp(state, heads.queries, dim, shared);
    __syncthreads();
    FinishDecode<T>(args, step, item, index, heads, shared);
    __syncthreads();
  }
}

// ---- prompts: the warps of a block have queries of their own and pass over the same pages

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) Prompt(const AttentionArgs args, const KvStep step) {
  constexpr int kQueries = kPromptQueries / kWarps / 8;
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const PromptItem item = step.list->prompts[blockIdx.x];
  const int32_t dim = step.layout.head_dim;
  const int32_t group = args.heads / step.layout.kv_heads;
  const int32_t kv_head = blockIdx.y;
  const int32_t queries = (item.row_end - item.row_begin) * group;
  // Queries of a KV head are packed: row by row, the group's heads of each.
  const auto row_of = [&](int32_t query) { return item.row_begin + query / group; };
  const auto offset_of = [&](int32_t query) {
    return int64_t{kv_head * group + query % group} * dim;
  };
  for (int32_t begin = warp * kQueries * 8; begin < queries; begin += kPromptQueries) {
    Attending<kDim, kQueries> state;
    state.Clear();
    int32_t position[kQueries][2];
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      const int32_t mine = begin + n * 8 + g;
      LoadQuery(mine < queries ? args.q.row<T>(row_of(mine)) + offset_of(mine) : nullptr, dim, n,
                &state);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t query = begin + n * 8 + 2 * t + i;
        position[n][i] = query < queries ? step.positions[row_of(query)] : -1;
      }
    }
    const int32_t newest = step.positions[row_of(min(begin + kQueries * 8, queries) - 1)];
    const int32_t oldest =
        args.window > 0 ? max(0, step.positions[row_of(begin)] - args.window + 1) : 0;
    for (int32_t block = oldest / kPageTokens; block <= newest / kPageTokens; ++block) {
      const Page<T, false> page(step, KeyBlock(step, item.sequence, block, args.layer, kv_head),
                                newest - block * kPageTokens + 1);
      PageKeys<kDim> keys;
      PageValues<kDim> values;
      page.Load(&keys);
      page.Load(&values);
      const auto visible = [&](int n, int i, int token) {
        const int32_t at = block * kPageTokens + token;
        return at <= position[n][i] && (args.window == 0 || at > position[n][i] - args.window);
      };
      Scores<kQueries> scores;
      MultiplyKeys<T, kDim, kQueries>(keys, state, scores);
      FoldValues<T, kDim, kQueries>(values, scores, args.scale * kLog2E, visible, &state);
    }
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float inverse = 1.0f / OverTokens(state.total[n][i], false);
        const int32_t query = begin + n * 8 + 2 * t + i;
        if (query >= queries) continue;
        T* out = args.out.row<T>(row_of(query)) + offset_of(query);
#pragma unroll
        for (int b = 0; b < kDim / 64; ++b) {
          const int d = 64 * b + 8 * g;
          if (d >= dim) continue;
          Vec8<T> values;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            values.v[2 * j] = FromFloat<T>(state.sums[n][b][j][i] * inverse);
            values.v[2 * j + 1] = FromFloat<T>(state.sums[n][b][j][i + 2] * inverse);
          }
          StoreVec(out + d, values);
        }
      }
    }
  }
}

// ---- any type and width: a warp a row and head, a token at a time

template <typename T>
__global__ void PlainAttention(const AttentionArgs args, const KvStep step) {
  extern __shared__ float shared[];  // [warps][2][head_dim]: query, sums
  WaitForKernelBefore();
  const int32_t dim = step.layout.head_dim;
  const int32_t row = blockIdx.x, head = blockIdx.y * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t position = step.positions[row];
  if (head >= args.heads || position < 0) return;
  const int32_t kv_head = head / (args.heads / step.layout.kv_heads);
  float* query = shared + threadIdx.x / 32 * 2 * dim;
  float* sums = query + dim;
  for (int32_t d = lane; d < dim; d += 32) {
    query[d] = ToFloat(args.q.row<T>(row)[head * dim + d]);
    sums[d] = 0;
  }
  float top = -INFINITY, total = 0;
  for (int32_t at = args.window > 0 ? max(0, position - args.window + 1) : 0; at <= position; ++at) {
    const T* keys = reinterpret_cast<const T*>(
        KeyBlock(step, step.row_sequence[row], at / kPageTokens, args.layer, kv_head));
    const T* key = keys + at % kPageTokens * dim;
    const T* value = key + int64_t{step.layout.kv_heads} * kPageTokens * dim;
    float score = 0;
    for (int32_t d = lane; d < dim; d += 32) score += query[d] * ToFloat(key[d]);
    score = WarpSum(score) * args.scale;
    const float new_top = fmaxf(top, score);
    const float shrink = expf(top - new_top), weight = expf(score - new_top);
    total = total * shrink + weight;
    top = new_top;
    for (int32_t d = lane; d < dim; d += 32) sums[d] = sums[d] * shrink + weight * ToFloat(value[d]);
  }
  for (int32_t d = lane; d < dim; d += 32) {
    args.out.row<T>(row)[head * dim + d] = FromFloat<T>(sums[d] / total);
  }
}

// ---- rotary embedding and store

// A warp a head: the query heads, then K's, then V's.
template <typename T>
__global__ void RopeStore(const RopeStoreArgs args, const Beside beside, const KvStep step) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int lane = threadIdx.x % 32;
  const int32_t row = blockIdx.x, dim = args.head_dim, half = dim / 2;
  const int32_t heads = args.q.width / dim, kv_heads = step.layout.kv_heads;
  const int32_t index = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  const int32_t position = step.positions[row];
  if (index >= heads + 2 * kv_heads || position < 0) return;
  const bool query = index < heads, value = index >= heads + kv_heads;
  const int32_t head = query ? index : (index - heads) % kv_heads;
  const Matrix& from = query ? args.q : value ? args.v : args.k;
  T* x = from.row<T>(row) + int64_t{head} * dim;
  const T* low_rank = nullptr;
  if (beside.delta.data != nullptr && beside.adapted[row] != 0) {
    low_rank = beside.delta.row<T>(row) + int64_t{index} * dim;
  }
  const auto load = [&](int32_t d) {
    return ToFloat(x[d]) + (low_rank != nullptr ? ToFloat(low_rank[d]) : 0.0f);
  };
  T* kept = nullptr;
  if (!query) {
    const std::byte* block = KeyBlock(step, step.row_sequence[row], position / kPageTokens,
                                      args.layer, head);
    kept = reinterpret_cast<T*>(const_cast<std::byte*>(block)) + position % kPageTokens * dim;
    if (value) kept += int64_t{kv_heads} * kPageTokens * dim;
  }
  if (value) {
    for (int32_t d = lane; d < dim; d += 32) kept[d] = FromFloat<T>(load(d));
    return;
  }
  const float* norm = query ? args.q_norm : args.k_norm;
  float scale = 1;
  if (norm != nullptr) {
    float squares = 0;
    for (int32_t d = lane; d < dim; d += 32) squares += load(d) * load(d);
    scale = rsqrtf(WarpSum(squares) / dim + args.norm_eps);
  }
  for (int32_t i = lane; i < half; i += 32) {
    float a = load(i) * scale, b = load(i + half) * scale;
    if (norm != nullptr) a *= norm[i], b *= norm[i + half];
    float sin = 0, cos = 1;
    // Hugging Face multiplies in float32; so does this.
    if (args.inverse_frequencies != nullptr) {
      sincosf(static_cast<float>(position) * args.inverse_frequencies[i], &sin, &cos);
    }
    const T low = FromFloat<T>(a * cos - b * sin), high = FromFloat<T>(b * cos + a * sin);
    if (query) x[i] = low, x[i + half] = high;
    else kept[i] = low, kept[i + half] = high;
  }
}

template <typename T, int kDim>
cudaError_t LaunchFast(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t kv_heads = step.layout.kv_heads, group = args.heads / kv_heads;
  const int32_t groups = kv_heads * DivideUp(group, 8);
  constexpr int32_t kBlocksPerMultiprocessor = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 1;
  const int32_t blocks = DivideUp(int64_t{kBlocksPerMultiprocessor} * Multiprocessors(), groups);
  const int32_t shared =
      kWarps * std::min(group, 8) * (step.layout.head_dim + 2) * static_cast<int32_t>(sizeof(float));
  cudaError_t error =
      Launch(Decode<T, kDim>, {dim3(blocks, groups), kThreads, shared}, stream, args, step);
  if (error != cudaSuccess || step.prompts == 0) return error;
  return Launch(Prompt<T, kDim>, {dim3(step.prompts, kv_heads), kThreads}, stream, args, step);
}

template <typename T>
cudaError_t LaunchPlain(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t shared = kWarps * 2 * step.layout.head_dim * static_cast<int32_t>(sizeof(float));
  const dim3 grid(args.q.rows, DivideUp(args.heads, kWarps));
  return Launch(PlainAttention<T>, {grid, kThreads, shared}, stream, args, step);
}

}  // namespace

bool HasFastAttention(int32_t head_dim, DType dtype) {
  return dtype != DType::kF32 && head_dim <= 256 && head_dim % 8 == 0;
}

cudaError_t LaunchRopeStore(const RopeStoreArgs& args, const Beside& beside, const KvStep& step,
                            cudaStream_t stream) {
  constexpr int32_t kHeadsPerBlock = 8;
  const int32_t heads = args.q.width / args.head_dim + 2 * step.layout.kv_heads;
  const LaunchShape shape{dim3(args.q.rows, DivideUp(heads, kHeadsPerBlock)), 32 * kHeadsPerBlock};
  return WithType(args.q.dtype, [&]<typename T>(T) {
    return Launch(RopeStore<T>, shape, stream, args, beside, step);
  });
}

cudaError_t LaunchAttention(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t dim = step.layout.head_dim;
  return WithType(args.q.dtype, [&]<typename T>(T) {
    if constexpr (!std::is_same_v<T, float>) {
      if (HasFastAttention(dim, args.q.dtype)) {
        if (dim <= 64) return LaunchFast<T, 64>(args, step, stream);
        if (dim <= 128) return LaunchFast<T, 128>(args, step, stream);
        return LaunchFast<T, 256>(args, step, stream);
      }
    }
    return LaunchPlain<T>(args, step, stream);
  });
}

}  // namespace lorikeet::cuda
