// Attention of decoding rows whose pages the copy engine brings. Of a block's five warps four fold
// pages, each through a ring of its own, and one asks for the pages of all the block's items in their
// order, as far ahead as there is room: the memory has work while an item ends and the next begins.
#include <algorithm>

#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/decode_parts.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/stream_blocks.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kPageTokens = KvLayout::kPageTokens;
constexpr int32_t kThreads = kDecodeThreads + 32;
constexpr int32_t kBoxBytes = kPageTokens * kBoxRowBytes;  // of 64 dimensions of a page's tokens

// A head's keys in kBoxes boxes, then its values.
template <int kDim>
struct Page {
  static constexpr int kBoxes = kDim / kBoxWidth;
  static constexpr int kBytes = 2 * kBoxes * kBoxBytes;
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;  // of a warp's ring
};

template <int kDim>
constexpr int32_t kRingsBytes = kDecodeWarps * Page<kDim>::kStages * Page<kDim>::kBytes;
template <int kDim>
constexpr int32_t kFoundBytes = kDecodeWarps * 8 * (kDim + 2) * int32_t{sizeof(float)};
template <int kDim>
constexpr int32_t kSharedBytes =
    kRingsBytes<kDim> + kFoundBytes<kDim> + 2 * kDecodeWarps * Page<kDim>::kStages * int32_t{sizeof(uint64_t)};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What lies between the copy engine and one folding warp. `count`: pages so far, of either side.
template <int kDim>
struct PageRing {
  std::byte* memory = nullptr;  // 1024-byte aligned
  PhaseBarrier* full = nullptr;
  PhaseBarrier* empty = nullptr;
  int32_t count = 0;

  static constexpr int kStages = Page<kDim>::kStages;
  __device__ int32_t stage() const { return count % kStages; }
  __device__ std::byte* page() const { return memory + stage() * Page<kDim>::kBytes; }
  __device__ void WaitUntilFull() const { full[stage()].Wait(count / kStages % 2); }
  __device__ void WaitUntilEmpty() const { empty[stage()].Wait(count / kStages % 2 ^ 1); }
};

// Lane w < kDecodeWarps brings what warp w folds. Only the page a row's own token lies in is written in
// this step; those before it are asked for while the kernel before is still at work.
template <int kDim>
__device__ void BringPages(const AttentionArgs& args, const KvStep& step, const CUtensorMap& map,
                           int32_t kv_head, PageRing<kDim> ring) {
  const int32_t lane = threadIdx.x % 32;
  const KvLayout& layout = step.layout;
  const int32_t page_rows = static_cast<int32_t>(layout.page_bytes() / (kDim * 2));
  const int32_t keys = static_cast<int32_t>(layout.Offset(args.layer, false, kv_head) / (kDim * 2));
  const int32_t values = keys + layout.kv_heads * kPageTokens;
  const auto bring = [&](int32_t row) {
    ring.WaitUntilEmpty();
    PhaseBarrier& full = ring.full[ring.stage()];
    std::byte* const to = ring.page();
    full.ArriveExpecting(Page<kDim>::kBytes);
#pragma unroll
    for (int i = 0; i < Page<kDim>::kBoxes; ++i) {
      BringBox(to + i * kBoxBytes, map, i * kBoxWidth, row + keys, full);
      BringBox(to + (Page<kDim>::kBoxes + i) * kBoxBytes, map, i * kBoxWidth, row + values, full);
    }
    ++ring.count;
  };
  bool waited = step.prompts > 0;
  for (int32_t index = blockIdx.x; index < step.list->decode_count; index += gridDim.x) {
    const DecodeItem item = step.list->decodes[index];
    const PageRange range = PagesOf(args, *step.list, item);
    const int32_t* ids = step.list->page_ids + item.page_begin + layout.PageOfLayer(args.layer);
    for (int32_t from = range.first; from <= range.last; from += 32) {
      const int32_t mine = ids[min(from + lane, range.last) * layout.pages_per_block];
      for (int32_t i = 0; i < 32 && from + i <= range.last; ++i) {
        const int32_t id = __shfl_sync(~0u, mine, i);
        if (!waited && from + i == item.position / kPageTokens) {
          WaitForKernelBefore();
          waited = true;
        }
        if (lane == (from - range.first + i) % kDecodeWarps) bring(id * page_rows);
        __syncwarp();
      }
    }
  }
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

__device__ inline float Exp2(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// Running softmax of one warp over eight queries. Lane 4 g + t holds queries 2t and 2t + 1 of tops,
// totals (of its tokens) and sums, and query g of the operand.
template <typename T, int kDim>
class Folding {
 public:
  // `row`: of query g; nullptr if there is none.
  __device__ explicit Folding(const T* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* const from = row + 16 * k + 8 * half + 2 * t;
        q_[k][half] = row == nullptr ? 0 : *reinterpret_cast<const uint32_t*>(from);
      }
    }
  }

  // scale includes log2 e; visible(token): of the page, asked where not all are.
  template <typename Visible>
  __device__ void Fold(const std::byte* page, float scale, bool all, const Visible& visible) {
    float scores[4];
    MultiplyKeys(SharedAddress(page), scores);
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] *= scale;
      if (!all && !visible(g + i / 2 * 8)) scores[i] = -INFINITY;
    }
    RaiseTops(scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = Exp2(scores[i] - top_[i % 2]);
      total_[i % 2] += scores[i];
    }
    const uint32_t low = Transpose8x8(Pack2<T>(scores[0], scores[1]));
    const uint32_t high = Transpose8x8(Pack2<T>(scores[2], scores[3]));
    AddValues(SharedAddress(page) + Page<kDim>::kBoxes * kBoxBytes, low, high);
  }

  // To shared memory, as [warps, queries, head_dim + 2].
  __device__ void Store(int32_t queries, float* shared) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = OverTokens(total_[i], false);
      if (2 * t + i >= queries) continue;
      const Partial out{shared + (warp * queries + 2 * t + i) * (kDim + 2)};
      if (g == 0) out.top() = top_[i], out.total() = total;
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
        out.sums()[16 * j + g] = sums_[j][i];
        out.sums()[16 * j + g + 8] = sums_[j][i + 2];
      }
    }
  }

 private:
  // Rows lie 128 bytes apart, their 16-byte chunks exchanged by the row's last three bits.
  __device__ void MultiplyKeys(uint32_t keys, float (&scores)[4]) const {
    const uint32_t r = threadIdx.x % 8, square = threadIdx.x % 32 / 8;
    const uint32_t at = keys + (r + square % 2 * 8) * kBoxRowBytes + ((square / 2 ^ r) << 4);
    float sums[2][4] = {};  // two chains of products
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t a[4];
      LoadSquares((at + k / 4 * kBoxBytes) ^ (k % 4 << 5), a);
      Mma<T>(sums[k % 2], a[0], a[1], a[2], a[3], q_[k][0], q_[k][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
  }

  // What was summed shrinks only once a score is kSlack above its query's top: weights may reach
  // 2^kSlack, which every type holds.
  __device__ void RaiseTops(const float (&scores)[4]) {
    constexpr float kSlack = 8;
    const float tops[2] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3])};
    if (!__any_sync(~0u, tops[0] > top_[0] + kSlack || tops[1] > top_[1] + kSlack)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = fmaxf(top_[i], OverTokens(tops[i], true));
      const float shrink = Exp2(top_[i] - top);
      top_[i] = top;
      total_[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) sums_[j][i] *= shrink, sums_[j][i + 2] *= shrink;
    }
  }

  __device__ void AddValues(uint32_t values, uint32_t low, uint32_t high) {
    const uint32_t r = threadIdx.x % 8, square = threadIdx.x % 32 / 8;
    const uint32_t at = values + (r + square / 2 * 8) * kBoxRowBytes + ((square % 2 ^ r) << 4);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t a[4];
      LoadSquaresTransposed((at + j / 4 * kBoxBytes) ^ (j % 4 << 5), a);
      Mma<T>(sums_[j], a[0], a[1], a[2], a[3], low, high);
    }
  }

  uint32_t q_[kDim / 16][2];
  float top_[2] = {-INFINITY, -INFINITY};  // log2 units
  float total_[2] = {};
  float sums_[kDim / 16][4] = {};  // [j]: dimensions 16 j + g and 8 more
};

// Tokens from `tokens` on are another request's leftovers: zeros stand for their values.
template <int kDim>
__device__ void ClearValues(std::byte* page, int32_t tokens) {
  constexpr int kChunks = kBoxRowBytes / 16;
  for (int box = Page<kDim>::kBoxes; box < 2 * Page<kDim>::kBoxes; ++box) {
    uint4* const chunks = reinterpret_cast<uint4*>(page + box * kBoxBytes);
    for (int i = tokens * kChunks + threadIdx.x % 32; i < kPageTokens * kChunks; i += 32) chunks[i] = kZero;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine writes here next
  __syncwarp();
}

// This warp's pages of an item: every kDecodeWarps-th.
template <typename T, int kDim>
__device__ void FoldPages(const AttentionArgs& args, const DecodeItem& item, const PageRange& range,
                          PageRing<kDim>* ring, Folding<T, kDim>* folding) {
  for (int32_t p = range.first + threadIdx.x / 32; p <= range.last; p += kDecodeWarps) {
    const int32_t first = p * kPageTokens, end = first + kPageTokens;
    std::byte* const page = ring->page();
    ring->WaitUntilFull();
    if (end > item.position + 1) ClearValues<kDim>(page, item.position + 1 - first);
    const bool all = end <= item.position + 1 && first >= range.oldest;
    folding->Fold(page, args.scale * kLog2E, all, [&](int token) {
      return first + token <= item.position && first + token >= range.oldest;
    });
    __syncwarp();
    if (threadIdx.x % 32 == 0) ring->empty[ring->stage()].Arrive();
    ++ring->count;
  }
}

#endif

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    DecodePages(const AttentionArgs args, const KvStep step, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = Page<kDim>::kStages;
  extern __shared__ __align__(1024) std::byte shared[];  // rings, what warps found, barriers
  float* const found = reinterpret_cast<float*>(shared + kRingsBytes<kDim>);
  // Not beside it: two blocks of 128 dimensions just fit.
  PhaseBarrier* const barriers = reinterpret_cast<PhaseBarrier*>(shared + kRingsBytes<kDim> + kFoundBytes<kDim>);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < 2 * kDecodeWarps * kStages) {
    barriers[threadIdx.x].Init(1);
    PublishBarriers();
  }
  __syncthreads();
  LetKernelAfterStart();
  const HeadGroup heads = GroupOf(args, step.layout, blockIdx.y);
  const int w = warp < kDecodeWarps ? warp : min(lane, kDecodeWarps - 1);
  PageRing<kDim> ring{shared + w * kStages * Page<kDim>::kBytes, barriers + w * kStages,
                      barriers + (kDecodeWarps + w) * kStages};
  if (warp == kDecodeWarps) {
    BringPages<kDim>(args, step, map, heads.kv_head, ring);
  } else {
    if (step.prompts == 0) WaitForKernelBefore();
    for (int32_t index = blockIdx.x; index < step.list->decode_count; index += gridDim.x) {
      const DecodeItem item = step.list->decodes[index];
      const T* const q = args.q.row<T>(item.row) + int64_t{heads.first_head + lane / 4} * kDim;
      Folding<T, kDim> folding(lane / 4 < heads.queries ? q : nullptr);
      FoldPages<T, kDim>(args, item, PagesOf(args, *step.list, item), &ring, &folding);
      folding.Store(heads.queries, found);
      SyncDecoding();
      FinishDecode<T>(args, step, item, index, heads, found);
      SyncDecoding();
    }
  }
  // Beside a step's prompts it starts with them, and waits for them here.
  if (step.prompts > 0) WaitForKernelBefore();
#endif
}

template <typename T, int kDim>
cudaError_t LaunchOf(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const auto kernel = DecodePages<T, kDim>;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kDim>);
  if (allowed != cudaSuccess) return allowed;
  CUtensorMap map;
  const int64_t rows = step.page_count * (step.layout.page_bytes() / (kDim * 2));
  const cudaError_t error = MakeBoxMap(step.pages, args.q.dtype, rows, kDim, kDim, kPageTokens, &map);
  if (error != cudaSuccess) return error;
  constexpr int32_t kBlocksPerMultiprocessor = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;
  const int32_t groups = step.layout.kv_heads * DivideUp(args.heads / step.layout.kv_heads, 8);
  const int32_t blocks = DivideUp(int64_t{kBlocksPerMultiprocessor} * Multiprocessors(), groups);
  return Launch(kernel, {dim3(blocks, groups), kThreads, kSharedBytes<kDim>}, stream, args, step, map);
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
         step.page_count * (step.layout.page_bytes() / (dim * 2)) <= INT32_MAX;
}

cudaError_t LaunchDecodeByCopyEngine(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  return args.q.dtype == DType::kBF16 ? LaunchTyped<BFloat16>(args, step, stream)
                                      : LaunchTyped<Half>(args, step, stream);
}

}  // namespace lorikeet::cuda
