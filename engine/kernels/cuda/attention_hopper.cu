// Attention whose pages the copy engine brings: of a block's five warps four fold pages and one asks for
// them, as far ahead as there is room.
#include <algorithm>

#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/attention_parts.cuh"
#include "engine/kernels/cuda/fold_pages.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kPageTokens = KvLayout::kPageTokens;
constexpr int32_t kThreads = kDecodeThreads + 32;

// ---- decoding: every warp folds pages of its own, through a ring of its own

template <int kDim>
struct DecodeShared {  // memory: rings, what warps found, barriers
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;
  static constexpr int32_t kRing = kStages * Page<kDim>::kBytes;
  static constexpr int32_t kRings = kDecodeWarps * kRing;
  static constexpr int32_t kFound = kDecodeWarps * 8 * PartialStride(kDim) * int32_t{sizeof(float)};
  static constexpr int kBarriers = 2 * kDecodeWarps * kStages;
  // All of it dynamic: two blocks of 128 dimensions just fit.
  static constexpr int32_t kBytes = kRings + kFound + kBarriers * int32_t{sizeof(uint64_t)};
  static constexpr int32_t kBlocks = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;  // on a multiprocessor
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kDim>
using DecodeRing = PageRing<kDim, DecodeShared<kDim>::kStages>;

// Brings the pages of all the block's items in their order, so that the memory has work while an item ends
// and the next begins; lane w < kDecodeWarps what warp w folds. `waits`: not before this step's keys and values are
// written, since a row may share blocks that another row of the step completes.
template <int kDim>
__device__ void BringForDecode(const AttentionArgs& args, const KvStep& step, const CUtensorMap& map,
                               int32_t kv_head, bool waits, DecodeRing<kDim> ring) {
  const int32_t lane = threadIdx.x % 32;
  const auto wait = [&] {
    if (waits) WaitForKernelBefore();
    waits = false;
  };
  const MapRows<kDim> rows(step.layout, args.layer, kv_head);
  for (int32_t index = blockIdx.x; index < step.list->decode_count; index += gridDim.x) {
    const DecodeItem item = step.list->decodes[index];
    const PageRange range = PagesOf(args, *step.list, item);
    const int32_t* ids = step.list->page_ids + item.page_begin + step.layout.PageOfLayer(args.layer);
    ForEachPage(ids, step.layout.pages_per_block, range.first, range.last, wait, [&](int32_t id, int32_t block) {
      const int32_t row = id * rows.of_page;
      if (lane == (block - range.first) % kDecodeWarps) ring.Bring(map, row + rows.keys, row + rows.values);
    });
  }
  wait();
}

// This warp's pages of an item: every kDecodeWarps-th.
template <typename T, int kDim>
__device__ void FoldPages(const AttentionArgs& args, const DecodeItem& item, const PageRange& range,
                          DecodeRing<kDim>* ring, Folding<T, kDim, 1>* folding) {
  for (int32_t p = range.first + threadIdx.x / 32; p <= range.last; p += kDecodeWarps) {
    const int32_t first = p * kPageTokens, end = first + kPageTokens;
    ring->WaitUntilFull();
    if (end > item.position + 1) ClearValues<kDim>(ring->page(), item.position + 1 - first);
    const bool all = end <= item.position + 1 && first >= range.oldest;
    folding->Fold(ring->page(), args.scale * kLog2E, all, [&](int, int, int token) {
      return first + token <= item.position && first + token >= range.oldest;
    });
    ring->Release();
  }
}

#endif

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, DecodeShared<kDim>::kBlocks)
    DecodePages(const AttentionArgs args, const KvStep step, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = DecodeShared<kDim>;
  extern __shared__ __align__(1024) std::byte shared[];
  float* const found = reinterpret_cast<float*>(shared + Shared::kRings);
  PhaseBarrier* const barriers = reinterpret_cast<PhaseBarrier*>(shared + Shared::kRings + Shared::kFound);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < Shared::kBarriers) {
    barriers[threadIdx.x].Init(1);
    PublishBarriers();
  }
  __syncthreads();
  LetKernelAfterStart();
  // A block without an item leaves its place to the next kernel's; the first ones stay even so, since that kernel
  // waits for this one alone. What is looked up is no kernel's doing.
  const int32_t items = step.list->decode_count;
  if (blockIdx.x > 0 && blockIdx.x >= items) return;
  // Beside a step's prompts it starts with them, who have waited, and waits for them at its end.
  const bool waits = step.prompts == 0;
  const HeadGroup heads = GroupOf(args, step.layout, blockIdx.y);
  const int w = warp < kDecodeWarps ? warp : min(lane, kDecodeWarps - 1);
  DecodeRing<kDim> ring{shared + w * Shared::kRing, barriers + w * Shared::kStages,
                        barriers + (kDecodeWarps + w) * Shared::kStages};
  if (warp == kDecodeWarps) {
    BringForDecode<kDim>(args, step, map, heads.kv_head, waits, ring);
  } else {
    DecodeItem next;
    if (blockIdx.x < items) next = step.list->decodes[blockIdx.x];
    if (waits) WaitForKernelBefore();
    for (int32_t index = blockIdx.x; index < items; index += gridDim.x) {
      const DecodeItem item = next;
      if (index + gridDim.x < items) next = step.list->decodes[index + gridDim.x];
      const T* const q = args.q.row<T>(item.row) + int64_t{heads.first_head} * kDim;
      Folding<T, kDim, 1> folding([&](int query) { return query < heads.queries ? q + query * kDim : nullptr; });
      FoldPages<T, kDim>(args, item, PagesOf(args, *step.list, item), &ring, &folding);
      folding.StorePartials(heads.queries, found + warp * heads.queries * PartialStride(kDim));
      SyncDecoding();
      FinishDecode<T>(args, step, item, index, heads, found);
      SyncDecoding();
    }
  }
  if (step.prompts > 0) WaitForKernelBefore();
#endif
}

// ---- prompts: the warps have queries of their own and fold the same pages

template <int kDim>
constexpr int kPromptStages = kDim <= 128 ? 4 : 2;
template <int kDim>
constexpr int32_t kPromptBytes = kPromptStages<kDim> * Page<kDim>::kBytes;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kPromptGroups = kPromptQueries / kDecodeWarps / 8;  // of eight queries, a warp's

// Folds the blocks [first, last] of the sequence into the queries from `begin` on, and stores results.
template <typename T, int kDim>
__device__ void FoldForPrompt(const AttentionArgs& args, const KvStep& step, const PromptQueries& queries,
                              int32_t begin, int32_t first, int32_t last,
                              PageRing<kDim, kPromptStages<kDim>>* ring) {
  const auto there = [&](int query) { return begin + query < queries.count(); };
  const auto position_of = [&](int query) { return step.positions[queries.row(begin + query)]; };
  Folding<T, kDim, kPromptGroups> folding(
      [&](int query) { return there(query) ? queries.Of<T>(args.q, begin + query) : nullptr; });
  int32_t position[kPromptGroups][2];
#pragma unroll
  for (int n = 0; n < kPromptGroups; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = 8 * n + threadIdx.x % 4 * 2 + i;
      position[n][i] = there(query) ? position_of(query) : -1;
    }
  }
  const int32_t eldest = position_of(0), newest = position_of(8 * kPromptGroups - 1);
  const int32_t of_all = step.positions[queries.item.row_end - 1];  // newest of the block
  for (int32_t p = first; p <= last; ++p) {
    const int32_t token = p * kPageTokens, end = token + kPageTokens;
    ring->WaitUntilFull();
    if (end > of_all + 1) ClearValues<kDim>(ring->page(), of_all + 1 - token);
    if (token <= newest && there(0)) {
      const bool all = end <= eldest + 1 && (args.window == 0 || token > newest - args.window);
      folding.Fold(ring->page(), args.scale * kLog2E, all, [&](int n, int i, int t) {
        const int32_t at = token + t;
        return at <= position[n][i] && (args.window == 0 || at > position[n][i] - args.window);
      });
    }
    ring->Release();
  }
  folding.Store([&](int query) { return there(query) ? queries.Of<T>(args.out, begin + query) : nullptr; });
}

#endif

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    PromptPages(const AttentionArgs args, const KvStep step, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = kPromptStages<kDim>;
  extern __shared__ __align__(1024) std::byte shared[];
  __shared__ PhaseBarrier full[kStages], empty[kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kStages) {
    full[threadIdx.x].Init(1), empty[threadIdx.x].Init(kDecodeWarps);
    PublishBarriers();
  }
  __syncthreads();
  WaitForKernelBefore();
  LetKernelAfterStart();  // not earlier: decoding starts without waiting
  // The last rows of a prompt see most: they come first.
  const PromptQueries queries = {step.list->prompts[gridDim.x - 1 - blockIdx.x], static_cast<int32_t>(blockIdx.y),
                                 args.heads / step.layout.kv_heads, kDim};
  const MapRows<kDim> rows(step.layout, args.layer, queries.kv_head);
  const int32_t* ids = step.list->page_ids + step.list->page_begin[queries.item.sequence] +
                       step.layout.PageOfLayer(args.layer);
  PageRing<kDim, kStages> ring{shared, full, empty};
  for (int32_t begin = 0; begin < queries.count(); begin += kPromptQueries) {
    const int32_t eldest = step.positions[queries.row(begin)];
    const int32_t first = args.window > 0 ? max(0, eldest - args.window + 1) / kPageTokens : 0;
    const int32_t last = step.positions[queries.row(begin + kPromptQueries - 1)] / kPageTokens;
    if (warp < kDecodeWarps) {
      FoldForPrompt<T, kDim>(args, step, queries, begin + warp * 8 * kPromptGroups, first, last, &ring);
    } else {
      ForEachPage(ids, step.layout.pages_per_block, first, last, [] {}, [&](int32_t id, int32_t) {
        const int32_t row = id * rows.of_page;
        if (lane == 0) ring.Bring(map, row + rows.keys, row + rows.values);
      });
    }
  }
#endif
}

// Rows of the pool's map.
int64_t PoolRows(const KvStep& step) {
  return step.page_count * (step.layout.page_bytes() / (step.layout.head_dim * 2));
}

template <typename T, int kDim>
cudaError_t LaunchOf(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const auto decode = DecodePages<T, kDim>;
  const auto prompt = PromptPages<T, kDim>;
  static const cudaError_t allowed = [&] {
    const auto allow = [](const auto& kernel, int32_t bytes) {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    const cudaError_t error = allow(decode, DecodeShared<kDim>::kBytes);
    return error != cudaSuccess ? error : allow(prompt, kPromptBytes<kDim>);
  }();
  if (allowed != cudaSuccess) return allowed;
  CUtensorMap map;
  const cudaError_t error =
      MakeBoxMap(step.pages, args.q.dtype, PoolRows(step), kDim, kDim, kPageTokens, &map);
  if (error != cudaSuccess) return error;
  if (step.prompts > 0) {
    const LaunchShape shape{dim3(step.prompts, step.layout.kv_heads), kThreads, kPromptBytes<kDim>};
    const cudaError_t launched = Launch(prompt, shape, stream, args, step, map);
    if (launched != cudaSuccess || !step.decoding) return launched;
  }
  const int32_t groups = step.layout.kv_heads * DivideUp(args.heads / step.layout.kv_heads, 8);
  const int32_t blocks = DivideUp(int64_t{DecodeShared<kDim>::kBlocks} * Multiprocessors(), groups);
  return Launch(decode, {dim3(blocks, groups), kThreads, DecodeShared<kDim>::kBytes}, stream, args, step, map);
}

template <typename T>
cudaError_t LaunchTyped(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  switch (step.layout.head_dim) {
    case 64: return LaunchOf<T, 64>(args, step, stream);
    case 128: return LaunchOf<T, 128>(args, step, stream);
    default: return LaunchOf<T, 256>(args, step, stream);
  }
}

}  // namespace

bool CanBringPages(const KvStep& step) {
  const int32_t dim = step.layout.head_dim;
  return (dim == 64 || dim == 128 || dim == 256) && CanMakeBoxMap(step.pages, step.layout.dtype, dim) &&
         PoolRows(step) <= INT32_MAX;
}

cudaError_t LaunchPagesAttention(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  return args.q.dtype == DType::kBF16 ? LaunchTyped<BFloat16>(args, step, stream)
                                      : LaunchTyped<Half>(args, step, stream);
}

}  // namespace lorikeet::cuda
