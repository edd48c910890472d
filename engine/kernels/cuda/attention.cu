#include "engine/kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/kernels/cuda/copy_async.cuh"
#include "engine/kernels/cuda/attention_parts.cuh"
#include "engine/kernels/cuda/kv_pages.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kWarps = kDecodeWarps;
constexpr int kThreads = kDecodeThreads;
constexpr int32_t kPageTokens = KvLayout::kPageTokens;
// Pages in a ring: as many as a multiprocessor's shared memory has room for.
template <int kDim>
constexpr int kStages = kDim <= 128 ? 3 : 2;
static_assert(kPageTokens == 16, "a page is one side of the tensor cores' tile");

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

// A page's K and V of one head in shared memory; the rows are padded so that eight lanes, which a
// 16-byte access serves at a time, meet eight different banks.
template <int kDim>
struct PageBuffer {
  static constexpr int kKeyBytes = kDim * 2 + 64;    // of a token's row
  static constexpr int kValueBytes = kDim * 2 + 16;
  static constexpr int kBytes = kPageTokens * (kKeyBytes + kValueBytes);

  std::byte* at;

  __device__ std::byte* key(int token) const { return at + token * kKeyBytes; }
  __device__ std::byte* value(int token) const {
    return at + kPageTokens * kKeyBytes + token * kValueBytes;
  }
};

// Has `kLanes` threads copy a head's block of a page. Tokens from `tokens` on are another request's
// leftovers: zeros stand for them.
template <typename T, int kDim, int kLanes>
__device__ void CopyPage(const KvStep& step, const std::byte* block, int32_t tokens,
                         const PageBuffer<kDim>& page) {
  constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
  const int32_t dim = step.layout.head_dim;
  const T* keys = reinterpret_cast<const T*>(block);
  const T* values = keys + int64_t{step.layout.kv_heads} * kPageTokens * dim;
#pragma unroll
  for (int i = 0; i < kPageTokens * kChunks / kLanes; ++i) {
    const int at = i * kLanes + threadIdx.x % kLanes, token = at / kChunks, d = at % kChunks * 8;
    const bool there = token < tokens && d < dim;
    const int from = there ? token * dim + d : 0;
    CopyAsync(page.key(token) + d * 2, keys + from, there);
    CopyAsync(page.value(token) + d * 2, values + from, there);
  }
}

template <int kQueries>
using Scores = float[kQueries][4];  // of each group: token g and g + 8 of queries 2t, 2t + 1

template <typename T, int kDim, int kQueries>
__device__ void MultiplyKeys(const PageBuffer<kDim>& page, const Attending<kDim, kQueries>& state,
                             Scores<kQueries>& scores) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  }
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const uint4 low = LoadCached(page.key(g) + 64 * i + 16 * t);
    const uint4 high = LoadCached(page.key(g + 8) + 64 * i + 16 * t);
#pragma unroll
    for (int n = 0; n < kQueries; ++n) MmaRows<T>(scores[n], low, high, state.q[n][i]);
  }
}

// Turns scores into weights 2^(scale · score - top) and shrinks what was summed before to the new
// top. visible(n, i, token): whether query 2t + i of group n sees the page's token. scale includes
// log2 e. weights: as the product's second operand.
template <typename T, int kDim, int kQueries, typename Visible>
__device__ void Soften(Scores<kQueries>& all, float scale, const Visible& visible,
                       Attending<kDim, kQueries>* state, uint32_t (&weights)[kQueries][2]) {
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
    weights[n][0] = Transpose8x8(Pack2<T>(scores[0], scores[1]));
    weights[n][1] = Transpose8x8(Pack2<T>(scores[2], scores[3]));
#pragma unroll
    for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float(&sums)[4] = state->sums[n][b][j];
        sums[0] *= shrink[0], sums[1] *= shrink[1], sums[2] *= shrink[0], sums[3] *= shrink[1];
      }
    }
  }
}

template <typename T, int kDim, int kQueries>
__device__ void AddValues(const PageBuffer<kDim>& page, const uint32_t (&weights)[kQueries][2],
                          Attending<kDim, kQueries>* state) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int b = 0; b < kDim / 64; ++b) {
    uint4 v[4];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9, dims 8 g of the 64-block
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = LoadCached(page.value(2 * t + i % 2 + i / 2 * 8) + 128 * b + 16 * g);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a0 = PairElement(v[0], v[1], 2 * j), a1 = PairElement(v[0], v[1], 2 * j + 1);
      const uint32_t a2 = PairElement(v[2], v[3], 2 * j), a3 = PairElement(v[2], v[3], 2 * j + 1);
#pragma unroll
      for (int n = 0; n < kQueries; ++n) {
        Mma<T>(state->sums[n][b][j], a0, a1, a2, a3, weights[n][0], weights[n][1]);
      }
    }
  }
}

template <typename T, int kDim, int kQueries, typename Visible>
__device__ void FoldPage(const PageBuffer<kDim>& page, float scale, const Visible& visible,
                         Attending<kDim, kQueries>* state) {
  Scores<kQueries> scores;
  uint32_t weights[kQueries][2];
  MultiplyKeys<T, kDim, kQueries>(page, *state, scores);
  Soften<T, kDim, kQueries>(scores, scale, visible, state, weights);
  AddValues<T, kDim, kQueries>(page, weights, state);
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

template <int kDim>
__device__ void StoreWarp(const Attending<kDim, 1>& state, int32_t queries, int32_t dim,
                          float* shared) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = OverTokens(state.total[0][i], false);
    const int query = 2 * t + i;
    if (query >= queries) continue;
    const Partial out{shared + (warp * queries + query) * PartialStride(dim)};
    if (g == 0) out.top(dim) = state.top[0][i], out.total(dim) = total;
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

// The pages of a chunk that this warp folds, every kWarps-th, through a ring of its own: while one
// is folded the next kStages<kDim> - 1 are on their way.
template <typename T, int kDim>
__device__ void FoldChunk(const AttentionArgs& args, const KvStep& step, const DecodeItem& item,
                          int32_t kv_head, std::byte* ring, Attending<kDim, 1>* state) {
  const int32_t position = item.position;
  const PageRange range = PagesOf(args, *step.list, item);
  const int32_t first = range.first + threadIdx.x / 32, last = range.last;
  if (first > last) return;
  const int32_t* ids = step.list->page_ids + item.page_begin + step.layout.PageOfLayer(args.layer);
  const auto id_of = [&](int32_t block) {
    return ids[min(block, last) * step.layout.pages_per_block];
  };
  const auto buffer = [&](int32_t i) {
    return PageBuffer<kDim>{ring + i % kStages<kDim> * PageBuffer<kDim>::kBytes};
  };
  int32_t next_id = id_of(first);
  const auto copy = [&](int32_t i) {  // the warp's i-th page; the one behind it is looked up
    const int32_t block = first + i * kWarps, id = next_id;
    next_id = id_of(block + kWarps);
    if (block <= last) {
      CopyPage<T, kDim, 32>(step, KeyBlockIn(step, id, args.layer, kv_head),
                            position - block * kPageTokens + 1, buffer(i));
    }
    CommitCopies();
  };
  for (int i = 0; i < kStages<kDim> - 1; ++i) copy(i);
  for (int32_t i = 0; first + i * kWarps <= last; ++i) {
    copy(i + kStages<kDim> - 1);
    WaitForCopies<kStages<kDim> - 1>();
    __syncwarp();
    const auto visible = [&](int, int, int token) {
      const int32_t at = (first + i * kWarps) * kPageTokens + token;
      return at <= position && at >= range.oldest;
    };
    FoldPage<T, kDim, 1>(buffer(i), args.scale * kLog2E, visible, state);
    __syncwarp();  // before the page's place is written again
  }
  WaitForCopies<0>();
}

// Beside a step's prompts, which bound little of the memory, it needs what they need and not what
// they write: it starts with them and waits for them at its end.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) Decode(const AttentionArgs args, const KvStep step) {
  extern __shared__ __align__(16) std::byte shared[];  // rings, then [warps, queries] partials
  LetKernelAfterStart();
  if (step.prompts == 0) WaitForKernelBefore();
  const int g = threadIdx.x % 32 / 4;
  const int32_t dim = step.layout.head_dim;
  const HeadGroup heads = GroupOf(args, step.layout, blockIdx.y);
  const int32_t items = step.list->decode_count;
  std::byte* ring = shared + threadIdx.x / 32 * kStages<kDim> * PageBuffer<kDim>::kBytes;
  float* partials = reinterpret_cast<float*>(shared);
  DecodeItem next;
  if (blockIdx.x < items) next = step.list->decodes[blockIdx.x];
  for (int32_t index = blockIdx.x; index < items; index += gridDim.x) {
    const DecodeItem item = next;
    if (index + gridDim.x < items) next = step.list->decodes[index + gridDim.x];
    Attending<kDim, 1> state;
    state.Clear();
    const T* q = args.q.row<T>(item.row) + int64_t{heads.first_head + g} * dim;
    LoadQuery(g < heads.queries ? q : nullptr, dim, 0, &state);
    FoldChunk<T, kDim>(args, step, item, heads.kv_head, ring, &state);
    __syncthreads();
    StoreWarp(state, heads.queries, dim, partials);
    __syncthreads();
    FinishDecode<T>(args, step, item, index, heads, partials);
    __syncthreads();
  }
  if (step.prompts > 0) WaitForKernelBefore();
}

// ---- prompts: the warps of a block have queries of their own and fold the same pages

template <typename T, int kDim, int kQueries>
__device__ void StorePrompt(const PromptQueries& queries, const Matrix& out, int32_t begin,
                            const Attending<kDim, kQueries>& state) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = 1.0f / OverTokens(state.total[n][i], false);
      const int32_t query = begin + n * 8 + 2 * t + i;
      if (query >= queries.count()) continue;
      T* to = queries.Of<T>(out, query);
#pragma unroll
      for (int b = 0; b < kDim / 64; ++b) {
        const int d = 64 * b + 8 * g;
        if (d >= queries.dim) continue;
        Vec8<T> values;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values.v[2 * j] = FromFloat<T>(state.sums[n][b][j][i] * inverse);
          values.v[2 * j + 1] = FromFloat<T>(state.sums[n][b][j][i + 2] * inverse);
        }
        StoreVec(to + d, values);
      }
    }
  }
}

// Folds all pages that the block's queries from `block_begin` on see; this warp's begin at `begin`.
template <typename T, int kDim, int kQueries>
__device__ void FoldPrompt(const AttentionArgs& args, const KvStep& step,
                           const PromptQueries& queries, int32_t block_begin, int32_t begin,
                           std::byte* ring, Attending<kDim, kQueries>* state) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int32_t position[kQueries][2];
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
    const int32_t mine = begin + n * 8 + g;
    LoadQuery(mine < queries.count() ? queries.Of<T>(args.q, mine) : nullptr, queries.dim, n, state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t query = begin + n * 8 + 2 * t + i;
      position[n][i] = query < queries.count() ? step.positions[queries.row(query)] : -1;
    }
  }
  const int32_t newest = step.positions[queries.row(block_begin + kPromptQueries - 1)];
  const int32_t eldest = step.positions[queries.row(block_begin)];
  const int32_t my_newest = step.positions[queries.row(begin + kQueries * 8 - 1)];
  const int32_t first = args.window > 0 ? max(0, eldest - args.window + 1) / kPageTokens : 0;
  const int32_t pages = newest / kPageTokens - first + 1;
  const auto buffer = [&](int32_t i) {
    return PageBuffer<kDim>{ring + i % kStages<kDim> * PageBuffer<kDim>::kBytes};
  };
  const auto copy = [&](int32_t i) {
    if (i < pages) {
      const int32_t block = first + i;
      CopyPage<T, kDim, kThreads>(
          step, KeyBlock(step, queries.item.sequence, block, args.layer, queries.kv_head),
          newest - block * kPageTokens + 1, buffer(i));
    }
    CommitCopies();
  };
  for (int i = 0; i < kStages<kDim> - 1; ++i) copy(i);
  for (int32_t i = 0; i < pages; ++i) {
    WaitForCopies<kStages<kDim> - 2>();
    __syncthreads();  // the page is there, and the one before it has been folded by all
    copy(i + kStages<kDim> - 1);
    const int32_t first_token = (first + i) * kPageTokens;
    if (first_token > my_newest || begin >= queries.count()) continue;
    const auto visible = [&](int n, int k, int token) {
      const int32_t at = first_token + token;
      return at <= position[n][k] && (args.window == 0 || at > position[n][k] - args.window);
    };
    FoldPage<T, kDim, kQueries>(buffer(i), args.scale * kLog2E, visible, state);
  }
  WaitForCopies<0>();
  __syncthreads();
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) Prompt(const AttentionArgs args, const KvStep step) {
  constexpr int kQueries = kPromptQueries / kWarps / 8;
  extern __shared__ __align__(16) std::byte ring[];
  WaitForKernelBefore();
  LetKernelAfterStart();  // not earlier: decoding starts without waiting
  const PromptQueries queries = {step.list->prompts[blockIdx.x], static_cast<int32_t>(blockIdx.y),
                                 args.heads / step.layout.kv_heads, step.layout.head_dim};
  for (int32_t first = 0; first < queries.count(); first += kPromptQueries) {
    const int32_t begin = first + static_cast<int32_t>(threadIdx.x) / 32 * kQueries * 8;
    Attending<kDim, kQueries> state;
    state.Clear();
    FoldPrompt<T, kDim, kQueries>(args, step, queries, first, begin, ring, &state);
    StorePrompt<T, kDim, kQueries>(queries, args.out, begin, state);
  }
}

template <typename T, int kDim>
cudaError_t LaunchFast(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t kv_heads = step.layout.kv_heads, group = args.heads / kv_heads;
  const int32_t groups = kv_heads * DivideUp(group, 8);
  constexpr int32_t kRing = kStages<kDim> * PageBuffer<kDim>::kBytes;
  constexpr int32_t kDecodeShared = kWarps * kRing;
  static_assert(kDecodeShared <= 144 << 10, "FindDevice asks for as much");
  static_assert(kDecodeShared >= kWarps * 8 * PartialStride(kDim) * int32_t{sizeof(float)});
  static const cudaError_t ready = [] {
    const auto allow = [](const auto& kernel, int32_t bytes) {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    const cudaError_t error = allow(Decode<T, kDim>, kDecodeShared);
    return error != cudaSuccess ? error : allow(Prompt<T, kDim>, kRing);
  }();
  if (ready != cudaSuccess) return ready;
  constexpr int32_t kBlocksPerMultiprocessor = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;
  const int32_t blocks = DivideUp(int64_t{kBlocksPerMultiprocessor} * Multiprocessors(), groups);
  if (step.prompts > 0) {
    const cudaError_t error =
        Launch(Prompt<T, kDim>, {dim3(step.prompts, kv_heads), kThreads, kRing}, stream, args, step);
    if (error != cudaSuccess || !step.decoding) return error;
  }
  return Launch(Decode<T, kDim>, {dim3(blocks, groups), kThreads, kDecodeShared}, stream, args, step);
}

}  // namespace

cudaError_t LaunchAttention(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t dim = step.layout.head_dim;
  if (CanBringPages(step)) return LaunchPagesAttention(args, step, stream);
  if (dim > 256 || dim % 8 != 0) return LaunchPlainAttention(args, step, stream);
  return WithType(args.q.dtype, [&]<typename T>(T) {
    if constexpr (std::is_same_v<T, float>) {
      return LaunchPlainAttention(args, step, stream);
    } else {
      if (dim <= 64) return LaunchFast<T, 64>(args, step, stream);
      if (dim <= 128) return LaunchFast<T, 128>(args, step, stream);
      return LaunchFast<T, 256>(args, step, stream);
    }
  });
}

}  // namespace lorikeet::cuda
